"Plots and comparisons"
from .plots import *
from .compare import *
from .show import *
from .probe import *
from .outlook import *
