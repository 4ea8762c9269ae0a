"""Reach: programs compiled for chips that are not here, and what their compilers say of them."""

from benchmarks.reach._runs import cases as cases
from benchmarks.reach._runs import record_of as record_of
from benchmarks.reach._tables import conclude as conclude
from benchmarks.reach._tables import file_name as file_name
from benchmarks.reach._tables import is_known as is_known
from benchmarks.reach._tables import read as read
from benchmarks.reach._tables import summary as summary
