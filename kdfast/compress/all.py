"Prune, factorize, quantize, export"
from .prune import *
from .factorize import *
from .quantize import *
from .export import *
from .deploy import *
from .latency import *
from .pipeline import *
