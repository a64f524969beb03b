"Other ways to train"
from .decay import *
from .blocks import *
from .stages import *
from .assist import *
