"All networks and convolutions, and what they cost"
from .measure import *
from .convs import *
from .structured import *
from .swap import *
from .nets import *
from .cifar import *
