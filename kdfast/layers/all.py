"Taps, pairs and adapters of any network's layers"
from .taps import *
from .maps import *
from .pairs import *
from .adapters import *
from .cut import *
