# MuJoCo is a compiled module without type information, so pyright would find none of its names.
from typing import Any

def __getattr__(name: str) -> Any: ...
