"Teachers: sources, inference copies, the shared forward pass, the cache"
from .source import *
from .inference import *
from .callback import *
from .cache import *
