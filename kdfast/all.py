"The public API: `from kdfast.all import *`, after `from fastai.vision.all import *`. Folders export more from their own `all`"
from .core import probing  # chkstyle: ignore
from .data.all import *
from .devices import BF16, all_processes  # chkstyle: ignore
from .models.all import *
from .layers.all import Taps, layer_sizes, pair_layers, stage_taps  # chkstyle: ignore
from .teacher.all import *
from .distill.all import *
from .learner import *
from .train.all import *
from .compress.all import *
from .look.all import *

# Parts of what is above; who extends kdfast finds them in their folders' own `all`
del calibration_error, Composite, init_he, layer_similarity, Structured
