from .api import mixer_inner
from .compose import Linear, Side
from .native import mixer_of_modules, runs_modules

__all__ = ["Linear", "Side", "mixer_inner", "mixer_of_modules", "runs_modules"]
