"The teacher, as it is asked"
from .source import *
from .inference import *
from .callback import *
from .cache import *
