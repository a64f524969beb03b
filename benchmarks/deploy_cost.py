"""What a student costs in each kind of file that `learn.deploy` writes: size, time, and what becomes of its answers

    python benchmarks/deploy_cost.py

Networks are trained on the digits at 32 px, written, and run in their own runtimes from pixels to probabilities, one or 64 images at a time, turns interleaved, medians. The int8 networks of `learn.quantize` are written to ONNX beside those of onnxruntime's own quantization."""
import sys, tempfile, warnings
from argparse import ArgumentParser
from importlib.metadata import version
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')
import timm
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import probing
from kdfast.predict import DeployedModel

def vit(n_out): return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=6, num_classes=n_out)
def mobilenetv3(n_out): return timm.create_model('mobilenetv3_small_050', num_classes=n_out)

networks = {'WRN-16-1':(partial(wrn, 16, 1), 6, 3e-3), 'ResNet-18':(partial(resnet, 18), 3, 3e-3), 'MobileNet, half width':(partial(mobile, width=.5), 20, 3e-3),
    'MobileNetV3-Small 0.5':(mobilenetv3, 20, 3e-3), 'ViT-Tiny, 6 blocks':(vit, 15, 5e-4)}  # with epochs and learning rates
forms = {'ONNX':('full.onnx', {}), 'ONNX, int8':('int8.onnx', dict(int8=True)), 'ONNX, int8 by learn.quantize':('fx.onnx', {}), 'OpenVINO':('full.xml', {}),
    'ExecuTorch':('full.pte', {}), 'ExecuTorch, int8':('int8.pte', dict(int8=True))}

def trained(make, dls, epochs, lr, path):
    set_seed(0)
    learn = distill_learner(dls, None, make(n_out=dls.c), metrics=accuracy, path=path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def deployed(learn, form):
    "What `learn.deploy` reports; raises `ValueError` if this network has no such file"
    file,kwargs = forms[form]
    if file=='fx.onnx':
        learn = distill_learner(learn.dls, None, deepcopy(learn.student), metrics=accuracy, path=learn.path)
        learn.quantize()
    return learn.deploy(file, agree=0, **kwargs)

def times(nets, x, turns):
    "Median ms per image of each"
    ms = {k:[] for k in nets}
    for turn in range(turns+1):
        for k,net in nets.items():
            start = perf_counter()
            net(x)
            if turn: ms[k].append(1e3*(perf_counter()-start)/len(x))  # the first turn allocates
    return {k:median(v) for k,v in ms.items()}

def rows(name, learn, turns):
    reports,nets = {},{}
    for form in forms:
        try: reports[form] = deployed(learn, form)
        except ValueError as e: yield f"| {name} | {form} | {str(e).splitlines()[0]} |"
        else: nets[form] = DeployedModel(reports[form].file, torch.get_num_threads())
    pixels,labels = np.stack([x.permute(1,2,0).numpy() for x,_ in learn.dls.valid_ds]),np.array([int(y) for _,y in learn.dls.valid_ds])
    answers = {k:np.concatenate([net(o[None]) for o in pixels]).argmax(1) for k,net in nets.items()}
    with probing(learn.student): student = torch.cat([learn.student(b[0]) for b in learn.dls.valid]).argmax(1).numpy()
    ms = {n:times(nets, pixels[:n], turns*(4 if n==1 else 1)) for n in (1,64)}
    for form,o in reports.items():
        told = ' | '.join(f"{ms[n][form]:.3f} | {ms[n]['ONNX']/ms[n][form]:.1f}" for n in (1,64))
        yield f"| {name} | {form} | {o.MB:.2f} | {told} | {100*(answers[form]==student).mean():.1f} | {100*(answers[form]==labels).mean():.1f} |"

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--turns', type=int, default=15)
    parser.add_argument('--only', help="The first letters of one network")
    args,dls = parser.parse_args(argv),digits_dls(64)
    options = ''.join(f' --{k} {v}' for k,v in vars(args).items() if v!=parser.get_default(k))
    chosen = {k:v for k,v in networks.items() if k.startswith(args.only or '')}
    runtimes = ', '.join(f'{o} {version(o)}' for o in ('torch','onnxruntime','openvino','executorch'))
    print(f"`python benchmarks/deploy_cost.py{options}`, {runtimes}, {torch.get_num_threads()} threads, {'' if torch.cpu._is_vnni_supported() else 'no '}VNNI; ms per image, one or 64 at a time, and how many times faster than the ONNX file in float32 that is; first classes that are those of the student in float32, and accuracy, both in %.\n")
    print('| network | file | MB | ms, one | times | ms, 64 | times | agreement | accuracy |\n|---|---|---|---|---|---|---|---|---|')
    for name,(make,epochs,lr) in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, trained(make, dls, epochs, lr, Path(folder)), args.turns): print(row, flush=True)

if __name__=='__main__': main()
