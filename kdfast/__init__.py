"""A small network learns more from a large one than from labels alone. kdfast makes that one line of fastai, for any `DataLoaders`, any teacher and any student:

```python
from fastai.vision.all import *
from kdfast.all import *
learn = distill_learner(dls, teacher, student, metrics=accuracy)
learn.fit_one_cycle(5)
learn.export_student()
```

The teacher is a module, a `Learner`, an exported file, or a pretrained network from timm, torchvision or Hugging Face. The student is a module, a function such as `partial(wrn, 16, 1)`, or an architecture such as `resnet18`. The result is an ordinary `Learner`: mixed precision, MixUp, callbacks and `lr_find` work as usual. Normalization, image size and classes of the teacher are matched to yours; a teacher with other classes works, too: the student then learns its features instead of its outputs.

Modules:

- `kdfast.skill`: Distil a large network into a small one in fastai: which call does what, what to check and what goes wrong. Read this before writing code that uses kdfast"""

__version__ = "0.1.0"
