"""The types of public signatures, for annotations of one's own."""

from regjax._adapters import ModelFunction as ModelFunction
from regjax._adapters import ModelLoss as ModelLoss
from regjax._axes import Layouts as Layouts
from regjax._base import Batch as Batch
from regjax._base import Callback as Callback
from regjax._base import GradFn as GradFn
from regjax._base import LossFn as LossFn
from regjax._base import Mask as Mask
from regjax._base import MatVec as MatVec
from regjax._base import ModelFn as ModelFn
from regjax._base import OutputLossFn as OutputLossFn
from regjax._base import Params as Params
from regjax._base import PRNGKey as PRNGKey
from regjax._base import Progress as Progress
from regjax._base import ScalarOrSchedule as ScalarOrSchedule
from regjax._base import State as State
from regjax._base import Tree as Tree
from regjax._subsets import PartFunction as PartFunction

__all__ = [name for name in dir() if not name.startswith("_")]
