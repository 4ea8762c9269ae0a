"""What the library costs (`speed`), measured on this machine."""
