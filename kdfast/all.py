"Everything: `from kdfast.all import *`, after `from fastai.vision.all import *`"
from .core import *
from .data import *
from .losses.all import *
from .models.all import *
from .devices import *
from .layers.all import *
from .teacher.all import *
from .distill.all import *
from .learner import *
from .train.all import *
from .compress.all import *
from .look.all import *
from .experiments.all import *
from .doctor import *
