"All losses, as functions"
from .core import *
from .logits import *
from .features import *
from .relations import *
from .similarity import *
