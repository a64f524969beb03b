"Layers as products of smaller ones"
import itertools, pytest, torchvision
from torch.ao.quantization import quantize_dynamic
from fastai.vision.all import *
from kdfast.all import *
from kdfast.compress.factorize import TruncatedSVD
from conftest import n_hooks

def relative(a, b): return ((a-b).norm()/b.norm()).item()

@pytest.mark.parametrize('mode', ['zeros','reflect','circular'])
@pytest.mark.parametrize('groups', [1,2,4])
@pytest.mark.parametrize('form', [TruncatedSVD,SpatialSVD,Tucker2])
def test_exact_at_full_rank(form, groups, mode):
    torch.manual_seed(0)
    n,sizes = 0,[(1,1)] if form is TruncatedSVD else [(1,1),(3,3),(5,3),(2,3)]
    for ks,stride,padding,dilation,bias in itertools.product(sizes, [1,(2,1),3], [0,1,(2,1),'same'], [1,(2,1)], [True,False]):
        if padding=='same' and stride!=1: continue
        conv,x = nn.Conv2d(8, 12, ks, stride, padding, dilation, groups, bias, mode),torch.randn(2,8,11,12)
        f = form(conv)
        new = f(*f.full)
        assert relative(new(x), conv(x))<1e-5 and new(x).shape==conv(x).shape, conv
        assert sum(m.weight.numel() for m in new)==f.count(*f.full)
        n += 1
    assert n>=28

@pytest.mark.parametrize('shape', [(20,30),(30,20),(7,7)])
def test_linear(shape):
    for bias,extra in itertools.product((True,False), ((),(4,))):
        layer,x = nn.Linear(*shape, bias=bias),torch.randn(3,*extra,shape[0])
        f = TruncatedSVD(layer)
        assert relative(f(*f.full)(x), layer(x))<1e-5
        best = torch.linalg.svdvals(layer.weight.detach().double())
        assert f.error(3)==pytest.approx((best[3:].square().sum()/best.square().sum()).sqrt().item(), rel=1e-6)

@pytest.mark.parametrize('form', [SpatialSVD,Tucker2,CPDecomposition])
def test_the_error_told_is_the_error_made(form):
    "Over white noise, the relative error of outputs is that of the weights"
    torch.manual_seed(0)
    conv,x = nn.Conv2d(6, 8, 3, padding=1, bias=False),torch.randn(2000,6,12,12)
    f = form(conv)
    for ranks in ([(4,),(9,)] if form is not Tucker2 else [(3,4),(6,5)]):
        new = f(*ranks)
        assert sum(m.weight.numel() for m in new)==f.count(*ranks)
        inner = (slice(None),slice(None),slice(2,-2),slice(2,-2))
        assert relative(new(x)[inner], conv(x)[inner])==pytest.approx(f.error(*ranks), rel=.03)

def test_cp_keeps_stride_padding_and_dilation():
    torch.manual_seed(0)
    for stride,padding,dilation in itertools.product((1,(2,1)), (0,(1,2)), (1,(1,2))):
        conv,x = nn.Conv2d(3, 4, (3,2), stride, padding, dilation),torch.randn(2,3,9,10)
        f = CPDecomposition(conv)
        assert relative(f(*f.full)(x), conv(x))<.02 and f.error(*f.full)<.02
    with pytest.raises(ValueError, match='CP does not support groups, but this layer has 2'): CPDecomposition(nn.Conv2d(4, 4, 3, groups=2))

@pytest.mark.parametrize('form', [SpatialSVD,Tucker2])
def test_ranks(form):
    "As small as the energy allows, as large as the number of weights allows"
    torch.manual_seed(0)
    f = form(nn.Conv2d(12, 10, 3, groups=2))
    for e in (.3,.7,.95,1.):
        for r,kept in zip(f.ranks(e), f.kept): assert kept[r-1]>=e-1e-8 and (r==1 or kept[r-2]<e)
    for most in (60,200,400):
        ranks = f.within(most)
        assert f.count(*ranks)<=most or ranks==(1,)*len(ranks)
        if form is SpatialSVD and ranks!=f.full: assert f.count(ranks[0]+1)>most
    for bad in ((0,)*len(f.full), tuple(n+1 for n in f.full), f.full*2):
        with pytest.raises(ValueError, match='ranks of this layer must be from'): f(*bad)

def falling(net):
    "Singular values that fall, as training makes them"
    for m in net.modules():
        if isinstance(m, (nn.Conv2d,nn.Linear)): m.weight.data *= torch.logspace(0, -2, m.weight.shape[1]).view(1,-1,*[1]*(m.weight.dim()-2))
    return net

@pytest.mark.parametrize('make,size', [(lambda: wrn(10, 2), 32), pytest.param(lambda: torchvision.models.resnet18(num_classes=10), 64, marks=pytest.mark.slow), (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64),
    (lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=10), 64)])
def test_any_network(make, size):
    torch.manual_seed(0)
    net = make().eval()
    if hasattr(net, 'heads'): nn.init.normal_(net.heads.head.weight)  # torchvision starts it at zero
    falling(net)
    before = {k:v.clone() for k,v in net.state_dict().items()}
    x = torch.randn(2,3,size,size)
    with torch.no_grad():
        small,report = factorize(net, energy=.999)
        assert relative(small(x), net(x))<.2
        assert count_params(net)-count_params(small)==(report['weights']-report['now']).sum()>0
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())
    again = deepcopy(small)
    again.load_state_dict(small.state_dict())
    small.train()(x).sum().backward()
    assert {*report.loc[report['kept']!='', 'kept']}<={'too little to save','a NonDynamicallyQuantizableLinear'}

def test_budgets():
    net = falling(wrn(10, 2))
    for form,budget in itertools.product((SpatialSVD,Tucker2), (60_000,150_000,250_000)):
        small,_ = factorize(net, params=budget, conv=form)
        assert .97*budget<count_params(small)<=budget
    for ratio in (.2,.5):
        _,report = factorize(net, ratio=ratio)
        done = report[report['kept']=='']
        assert (done['now']<=ratio*done['weights']).all() and len(done)>=6

def test_what_stays():
    net = falling(wrn(10, 1))
    net.fc.requires_grad_(False)  # its bias too
    nn.utils.parametrizations.weight_norm(net.group1[0].conv1)
    net.group2[0].conv1.weight = net.group1[0].conv2.weight = nn.Parameter(torch.randn(32,16,3,3))
    net.group1[0].conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
    net.group1[0].conv2.weight = net.group2[0].conv1.weight
    small,report = factorize(net, ratio=.3, keep=['group3.*'])
    why = dict(zip(report['layer'], report['kept']))
    assert why['group1.0.conv1']=='a ParametrizedFull' and why['group2.0.conv1']==why['group1.0.conv2']=='another layer shares its weights'
    assert why['group3.0.conv2']=='kept as group3.*' and not any(p.requires_grad for p in small.fc.parameters()) and small.group2[0].conv2[0].weight.requires_grad

def test_a_shared_layer_stays_shared():
    layer = nn.Linear(16, 16)
    small,_ = factorize(nn.Sequential(layer, nn.ReLU(), layer), ratio=.3)
    assert small[0] is small[2]

def test_weights_that_are_read_from_outside_stay():
    net = torchvision.models.swin_transformer.SwinTransformer([4,4], 16, [1,1], [2,2], [4,4], num_classes=4)
    small,report = factorize(net, ratio=.3)
    small(torch.randn(1,3,32,32)).sum().backward()
    assert (report['kept']=='its weights are read by its parent module').sum()==4

def test_type_and_mode():
    net = falling(wrn(10, 1)).double().eval()
    small,_ = factorize(net, ratio=.3)
    assert {p.dtype for p in small.parameters()}=={torch.float64} and not any(m.training for m in small.modules())

def test_a_learner_goes_on(dls, quiet, tmp_path):
    net = falling(wrn(10, 1))
    learn = distill_learner(dls, net, deepcopy(net), cbs=[KD(),AT()], path=tmp_path)
    learn.fit(1)
    learn.factorize(ratio=.5)
    before = {n:p.detach().clone() for n,p in learn.student.named_parameters()}
    learn.fit(1)
    assert not any(torch.equal(before[n], p) for n,p in learn.student.named_parameters())
    assert not n_hooks(learn.model) and count_params(learn.student)<count_params(net)
    assert isinstance(load_learner(learn.export_student()).model.group1[0].conv1, nn.Sequential)
    learn = distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=FitNet())
    learn.fit(1)
    before = learn.model
    with pytest.raises(ValueError, match='factorize first, then add FitNet'): learn.factorize(ratio=.5)
    assert learn.model is before

bad = [(lambda: wrn(10, 1), {}, 'Give exactly one of ratio, energy, params'), (lambda: wrn(10, 1), dict(ratio=.5, energy=.5), 'Give exactly one of'), (lambda: wrn(10, 1), dict(ratio=0), 'ratio must be above 0'),
    (lambda: wrn(10, 1), dict(energy=1.2), 'energy must be above 0'), (lambda: wrn(10, 1), dict(params=10), 'The budget of 10 is out of reach: factorized, this network has'),
    (lambda: wrn(10, 1), dict(ratio=.5, keep='head'), 'keep names head, but no layer matches'), (lambda: nn.Sequential(nn.ReLU()), dict(ratio=.5), 'Nothing to factorize'),
    (lambda: wrn(10, 1), dict(energy=.5, conv=CPDecomposition), 'pass ratio'), (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), dict(ratio=.5, conv=CPDecomposition), '0 cannot be factorized: '),
    (lambda: nn.Sequential(nn.LazyLinear(3)), dict(ratio=.5), '0 is a LazyLinear, which has no weights yet'), (lambda: quantize_dynamic(nn.Sequential(nn.Linear(4, 4))), dict(ratio=.5), '0 is quantized')]

@pytest.mark.parametrize('make,kwargs,message', bad, ids=range(len(bad)))
def test_bad_input(make, kwargs, message):
    with pytest.raises(ValueError, match=message): factorize(make(), **kwargs)

def test_without_tensorly(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorly', None)
    with pytest.raises(ImportError, match=r'pip install kdfast\[factorize\]'): CPDecomposition(nn.Conv2d(4, 4, 3))(2)

@pytest.mark.parametrize('conv', [SpatialSVD,Tucker2])
@pytest.mark.parametrize('amount', [dict(ratio=1.),dict(ratio=.97),dict(energy=1.),dict(params=count_params(resnet(10, width=.5, n_out=1000)))])
def test_what_saves_next_to_nothing_costs_nothing(conv, amount):
    "With ranks just below full a product keeps most of the weights and loses a third of the output"
    set_seed(0)
    net,x = resnet(10, width=.5, n_out=1000).eval(),torch.randn(2,3,64,64)
    small,report = factorize(net, conv=conv, **amount)
    whole = report[report.kept!='']
    assert (report.now<=.95*report.weights)[report.kept==''].all() and (whole.now==whole.weights).all()
    if amount in (dict(ratio=1.),dict(energy=1.)): assert torch.equal(small(x), net(x)) and count_params(small)==count_params(net)
