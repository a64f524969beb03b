"Other ways to train"
from .decay import *
from .blocks import *
from .assist import *
