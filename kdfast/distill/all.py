"All methods"
from .core import *
from .logits import *
from .features import *
from .relations import *
from .activations import *
from .similarity import *
from .online import *
