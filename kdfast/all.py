"Everything: `from kdfast.all import *`, after `from fastai.vision.all import *`"
from .losses import *
from .measure import *
from .convs import *
from .structured import *
from .swap import *
from .models import *
from .features import *
from .cut import *
from .data import *
from .teacher import *
from .distill import *
from .learner import *
from .decay import *
from .blocks import *
from .interpret import *
from .experiments import *
