"The teacher, as it is asked"
from .inference import *
from .callback import *
from .cache import *
