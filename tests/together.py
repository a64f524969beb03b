"One of several processes that do a sweep together. Arguments: folder"
import sys
from fastai.vision.all import *
from kdfast.all import *
from kdfast.experiments.run import Run
from kdfast.experiments.sweep import Sweep

if __name__=='__main__':
    torch.set_num_threads(1)
    default_device(False)
    big = Run(student='wrn-10-2', epochs=1, pct=.4, size=16)
    Sweep('together', [Run(method='kd', teacher=big, epochs=2, pct=.2, bs=32, size=16)], sys.argv[1]).run()
