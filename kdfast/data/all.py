"Data sets: in memory, the benchmarks' files, any folder of images"
from .memory import *
from .files import *
from .folder import *
