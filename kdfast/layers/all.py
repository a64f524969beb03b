"Taps, pairs and adapters for the layers of any network"
from .taps import *
from .maps import *
from .pairs import *
from .adapters import *
from .cut import *
