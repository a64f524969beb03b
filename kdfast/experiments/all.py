"Runs, records, tables"
from .arm import *
from .checkpoint import *
from .results import *
from .run import *
from .records import *
from .sweep import *
from .tables import *
from .research import *
