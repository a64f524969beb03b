"Ways to train beside the usual one"
from .decay import *
from .blocks import *
from .assist import *
