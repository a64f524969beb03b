"""What integers save: networks in float32, in bfloat16, in int8, and as ONNX files of the first and the last

    python benchmarks/int8_cost.py

Batch norms see noise first, and int8 is calibrated on it; outputs are compared: where int8 is further than 0.2 of the outputs from float32, nothing is printed. Then forwards on a CPU, turns interleaved, medians."""
import sys, tempfile, warnings
from argparse import ArgumentParser
from importlib.metadata import version
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from kdfast.all import *

networks = {'WRN-16-1, 32 px':(partial(wrn, 16, 1), 32), 'WRN-40-2, 32 px':(partial(wrn, 40, 2), 32), 'ResNet-18, 64 px':(partial(resnet, 18), 64), 'MobileNet, 64 px':(mobile, 64)}

class InBF16(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = deepcopy(net).to(memory_format=torch.channels_last)
    def forward(self, x):
        with torch.autocast('cpu', dtype=torch.bfloat16): return self.net(x.to(memory_format=torch.channels_last))

def noise(size, n=64):
    x,y = torch.randint(0, 255, (n,3,size,size), dtype=torch.uint8),torch.arange(n)%10
    return tensor_dls((x, y), (x, y), bs=32)

def forms(make, size, folder):
    "A network in five forms; leaves with a message where they are not the same"
    net,dls = make(),noise(size)
    with torch.no_grad():
        for _ in range(20): net.train()(dls.one_batch()[0].as_subclass(Tensor))
    int8,_ = quantize(net.eval(), dls, n=2)
    x = dls.valid.one_batch()[0].as_subclass(Tensor)
    with torch.no_grad(): far = ((int8(x)-net(x)).norm()/net(x).norm()).item()
    if not far<.2: sys.exit(f'int8 differs from float32 by {far:.2g}')
    files = {f'{k}, onnxruntime':export_onnx(o, Path(folder)/f'{k}.onnx', size) for k,o in dict(float32=net, int8=int8).items()}
    return dict({'float32':net, 'bfloat16':InBF16(net), 'int8':int8}, **files),far

def table(name, models, far, size, turns):
    ms = {bs:compare(models, size, bs, turns) for bs in (1,64)}
    for k in models:
        one,many = (ms[bs].loc[k,'ms per image'] for bs in (1,64))
        times = ' | '.join(f"{o:.3f} | {ms[bs].loc['float32','ms per image']/o:.1f}" for bs,o in ((1,one),(64,many)))
        yield f"| {name} | {k} | {ms[1].loc[k,'MB on disk']:.2f} | {times} | {f'{far:.3f}' if k=='int8' else ''} |"

def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--turns', type=int, default=15)
    args = parser.parse_args(argv)
    set_seed(0)
    lines = []
    for name,(make,size) in networks.items():
        with tempfile.TemporaryDirectory() as folder: lines += table(name, *forms(make, size, folder), size, args.turns)
    print(f"`python benchmarks/int8_cost.py{f' --turns {args.turns}' if args.turns!=15 else ''}`, torch {version('torch')}, onnxruntime {version('onnxruntime')}, {torch.get_num_threads()} threads; ms per image, one or 64 at a time, and how many times faster than float32 that is; relative difference of int8's outputs.\n")
    print('| network | form | MB | ms, one | times | ms, 64 | times | difference |\n|---|---|---|---|---|---|---|---|')
    print('\n'.join(lines))

if __name__=='__main__': main()
