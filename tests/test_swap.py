"Any network with other convolutions"
import pytest, torchvision.models as tvm
from fastai.vision.all import *
from fastai.vision.models import xresnet
from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic
from torch.nn.utils import parametrizations
from kdfast.all import *
from kinds import kinds

def small(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

networks = dict(resnet18=tvm.resnet18, mobilenet_v2=tvm.mobilenet_v2, vgg11_bn=tvm.vgg11_bn, densenet121=tvm.densenet121, convnext_tiny=tvm.convnext_tiny, squeezenet1_1=tvm.squeezenet1_1, xresnet18=xresnet.xresnet18,
    wrn=lambda: wrn(16, 1), resnet=lambda: resnet(10), plain=lambda: plain_cnn(64))

@pytest.mark.parametrize('name', networks)
def test_any_network(name):
    "Outputs of the old size, the old network as it was, a report of every convolution"
    net = networks[name]().eval()
    before,x = {k:v.clone() for k,v in net.state_dict().items()},torch.randn(2,3,64,64)
    spatial = [n for n,m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size!=(1,1) and m.groups==1]
    if name in ('mobilenet_v2','convnext_tiny'):  # nothing but a stem, patches and depthwise convolutions
        with pytest.raises(ValueError, match='Nothing to swap: .*the stem'): swap_convs(net, Separable)
        return
    swapped,report = swap_convs(net, Separable)
    assert swapped(x).shape==net(x).shape and not swapped.training
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert set(report.layer)=={n for n,m in net.named_modules() if isinstance(m, nn.Conv2d)}
    replaced = report[report.kept=='']
    assert {*replaced.layer}<={*spatial[1:]} and all(isinstance(swapped.get_submodule(n), Separable) for n in replaced.layer)
    assert count_params(net)-count_params(swapped)==(report.weights-report.now).sum()>0

@pytest.mark.parametrize('conv', [c for k,c in kinds.items() if k not in ('Hashed_budget','LowRank_rank')], ids=[k for k in kinds if k not in ('Hashed_budget','LowRank_rank')])
def test_every_kind(conv):
    "The variance of what is put out stays, before and after training; biases are kept"
    torch.manual_seed(0)
    net = small()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d): m.weight.mul_(7)
    x = torch.randn(16,8,12,12).relu()
    ours,old = [],net[3](x).var()
    for _ in range(10):
        swapped,_ = swap_convs(net, conv)
        ours.append(swapped[3](x).var())
    assert .5<torch.stack(ours).mean()/old<2
    assert torch.equal(swapped[5].get_parameter([n for n,_ in swapped[5].named_parameters() if n.endswith('bias')][-1]), net[5].bias)
    swapped(torch.randn(4,3,12,12)).sum().backward()

def test_a_seed_decides():
    torch.manual_seed(3)
    a,_ = swap_convs(small().requires_grad_(False), Separable)
    torch.manual_seed(3)
    b,_ = swap_convs(small(), Separable)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert a[3][0].weight.requires_grad and not a[0].weight.requires_grad

def test_what_is_kept_is_said():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding='same'), nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'), nn.ConvTranspose2d(8, 8, 2, 2), parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.Conv2d(8, 8, (1,3), padding=(0,1)))
    swapped,report = swap_convs(net, Separable)
    assert [o.split(',')[0] for o in report.kept]==['the stem', '1x1', '2 groups already', 'kernel 2x2', 'dilation 2', 'padding (0', '', 'padding (1', 'a ConvTranspose2d', 'a ParametrizedConv2d', 'kernel 1x3']
    assert [n for n,m in swapped.named_children() if isinstance(m, Separable)]==['6']

def test_keep():
    net = tvm.resnet18()
    kept = swap_convs(net, Separable, keep='layer4*')[1]
    assert set(kept[kept.layer.str.startswith('layer4') & (kept.kept!='1x1')].kept)=={'kept as layer4*'} and (kept.kept=='').any()
    assert swap_convs(net, Separable, keep=['layer1.0.conv1','layer4*'])[1].set_index('layer').kept['layer1.0.conv1']=='kept as layer1.0.conv1'
    every = swap_convs(net, Grouped_any, keep=lambda name,conv,first: None)[1]
    assert (every.kept=='').all()
    with pytest.raises(ValueError, match='layer5'): swap_convs(net, Separable, keep='layer5*')

def Grouped_any(ni, nf, ks, stride, bias): return Grouped(ni, nf, ks, stride, bias, groups=1)

def test_a_shared_layer_stays_shared():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    swapped,_ = swap_convs(nn.Sequential(nn.Conv2d(3, 8, 3), conv, conv), Separable)
    assert swapped[1] is swapped[2] and isinstance(swapped[1], Separable)

def test_device_type_and_mode():
    swapped,_ = swap_convs(small().double().eval(), Separable)
    assert {p.dtype for p in swapped.parameters()}=={torch.float64} and not any(m.training for m in swapped.modules())

def test_it_learns_from_what_it_was(dls, quiet):
    teacher = resnet(10, stem='small')
    learn = distill_learner(dls, teacher, swap_convs(teacher, Separable)[0], cbs=[KD(),AT()])
    learn.fit(1)
    assert len(learn.recorder.history)==1

class Custom(nn.Conv2d): pass

def quantized():
    net = small().eval()
    net.qconfig = torch.ao.quantization.get_default_qconfig('x86')
    return torch.ao.quantization.convert(torch.ao.quantization.prepare(nn.Sequential(torch.ao.quantization.QuantStub(), net)))

bad = [(lambda: tvm.resnet18(), partial(Grouped, groups=5), 'layer1.0.conv1, a 3x3 convolution from 64 to 64 channels, cannot be replaced: groups=5 does not divide'),
    (lambda: nn.Sequential(nn.Linear(3, 3)), Separable, 'Nothing to swap: the network has no convolution'), (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), Separable, r'Nothing to swap: 0 \(the stem\), 1 \(1x1\)'),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3)), Separable, '1 is a LazyConv2d, which has no weights yet: run'), (quantized, Separable, 'is quantized, or prepared for it: change the network first'),
    (lambda: tvm.resnet18(), partial(LowRank, rank=65), 'layer1.0.conv1, .* got rank=65'), (lambda: tvm.resnet18(), partial(Hashed, ratio=2), 'ratio must be above 0 and at most 1, got 2')]

@pytest.mark.parametrize('make,conv,message', bad, ids=range(len(bad)))
def test_bad_input(make, conv, message):
    net = make()
    modules = [*net.modules()]
    with pytest.raises(ValueError, match=message): swap_convs(net, conv)
    assert [*net.modules()]==modules
