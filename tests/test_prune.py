"Networks with fewer channels, or with more zeros"
import pytest, torchvision
import torch_pruning as tp
from torch.ao.quantization import quantize_dynamic
from fastai.vision.all import *
from kdfast.all import *
from kdfast.compress.prune import positions_left, prune_copy
from conftest import n_hooks, slow_but

importances = dict(L1=tp.importance.GroupMagnitudeImportance(p=1), L2=None, Taylor=tp.importance.GroupTaylorImportance(), scale=tp.importance.BNScaleImportance(), random=tp.importance.RandomImportance())
networks = {'wrn': (lambda: wrn(16, 1), 32), 'wrn separable': (lambda: wrn(10, 2, conv=Separable), 32), 'resnet18': (lambda: torchvision.models.resnet18(num_classes=10), 64),
    'vgg11_bn': (lambda: nn.Sequential(torchvision.models.vgg11_bn(num_classes=10).features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10)), 64), 'mobilenet_v2': (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64), 'densenet121': (lambda: torchvision.models.densenet121(num_classes=10), 64)}

def lively(net):
    "Statistics and scales that differ by channel"
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for o,low in ((m.weight.data,.5),(m.running_var,.5),(m.running_mean,-1),(m.bias.data,-1)): o.uniform_(low, 1.5)
    return net.eval()

@pytest.mark.parametrize('name', slow_but(*{*networks}-{'densenet121'}, of=networks))
def test_outputs_are_those_of_the_masked_network(name):
    torch.manual_seed(0)
    make,size = networks[name]
    net = lively(make())
    before = {k:v.clone() for k,v in net.state_dict().items()}
    small,kept,history = prune_copy(net, (torch.zeros(1,3,size,size),), .5, None, None, None, (), None, {})
    masked = deepcopy(net)
    for (n,at),p in zip(positions_left(net, (torch.zeros(1,3,size,size),), history).items(), masked.parameters()):
        mask = torch.zeros(p.numel())
        mask[at.flatten()] = 1
        p.data *= mask.view_as(p)
        assert at.shape==small.get_parameter(n).shape
    x = torch.randn(4,3,size,size)
    with torch.no_grad(): ours,theirs = small(x),masked(x)
    assert ((ours-theirs).norm()/theirs.norm()).item()<1e-5
    assert count_params(small)<.4*count_params(net) and count_macs(small, size)<.4*count_macs(net, size)
    assert all(torch.equal(before[k], v) for k,v in net.state_dict().items())

@pytest.mark.parametrize('name', importances)
def test_importances(name, dls, quiet):
    learn = distill_learner(dls, None, wrn(10, 2))
    state = torch.get_rng_state() if name!='random' else None
    report = learn.prune(.5, importance=importances[name])
    assert state is None or torch.equal(state, torch.get_rng_state())
    assert [*report.loc[report['kept']=='', 'left']]==[o//2 for o in report.loc[report['kept']=='', 'channels']] and [*report.loc[report['kept']!='', 'kept']]==['a head']
    learn.fit(1)

def test_the_least_important_go():
    net = wrn(10, 1)
    net.group1[0].conv1.weight.data[3:11] *= 1e-3
    small,_ = prune_channels(net, 32, ratio=.5, importance=tp.importance.GroupMagnitudeImportance(p=1))
    left = [*range(3),*range(11,16)]
    assert torch.equal(small.group1[0].conv1.weight[:,:], net.group1[0].conv1.weight[left][:,[i for i in range(16) if any(torch.equal(small.stem.weight[j], net.stem.weight[i]) for j in range(8))]])

@pytest.mark.slow
@pytest.mark.parametrize('unit,budgets', [('params', (20_000,60_000,200_000)), ('macs', (3_000_000,20_000_000))])
def test_budgets(unit, budgets):
    net,cost = wrn(10, 2),dict(params=count_params, macs=lambda m: count_macs(m, 32))[unit]
    for budget in budgets:
        for kw in ({},dict(importance=tp.importance.RandomImportance()),dict(global_pruning=True),dict(importance=tp.importance.RandomImportance(), global_pruning=True),dict(round_to=4)):
            small,_ = prune_channels(net, 32, **{unit:budget}, **kw)
            assert (.7 if 'round_to' in kw else .85)*budget<cost(small)<=budget, kw

def test_keep_round_and_frozen():
    net = wrn(10, 2)
    net.stem.requires_grad_(False)
    small,report = prune_channels(net, 32, ratio=.4, keep='group1.*', round_to=8)
    kept = dict(zip(report['layer'], report['kept']))
    assert kept['group1.0.conv1']=='kept as group1.*' and small.group1[0].conv1.out_channels==32
    assert all(m.out_channels%8==0 for m in small.modules() if isinstance(m, nn.Conv2d))
    assert [p.requires_grad for p in small.parameters()]==[p.requires_grad for p in net.parameters()] and all(p.grad is None for p in small.parameters())

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.a,self.b = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),nn.Linear(8, 4),nn.Linear(8, 6)
    def forward(self, x): return dict(a=self.a(x := self.body(x)), b=[self.b(x)])

def test_every_head_stays():
    small,report = prune_channels(TwoHeads(), 32, ratio=.5)
    assert (small.a.out_features,small.b.out_features,small.body[0].out_channels)==(4,6,4)

def test_the_last_layer_is_a_head_whatever_follows():
    small,report = prune_channels(small_net().append(nn.LogSoftmax(1)), 32, ratio=.5)
    assert small[7].out_features==10 and [*report['kept']]==['','','a head']

@pytest.mark.parametrize('opt_func', [Adam, partial(SGD, mom=.9), partial(OptimWrapper, opt=torch.optim.Adam)], ids=['Adam','SGD','torch'])
def test_the_optimizer_goes_on_with_what_is_left(opt_func, dls, quiet):
    learn = distill_learner(dls, None, wrn(10, 1), opt_func=opt_func)
    learn.fit(1)
    model,modules = learn.model,[*learn.model.modules()]
    state = getattr(learn.opt, 'opt', learn.opt).state
    old = {n:(p, {k:v.clone() for k,v in state[p].items() if isinstance(v, Tensor) and v.shape==p.shape}) for n,p in model.named_parameters()}
    x = torch.zeros(1,3,32,32)
    history = prune_copy(model, (x,), .5, None, None, None, (), None, {})[-1]
    at = positions_left(model, (x,), history)
    learn.prune(.5)
    assert learn.model is model and all(a is b for a,b in zip(modules, model.modules()))
    new = dict(model.named_parameters())
    assert {id(p) for g in learn.opt.param_lists for p in g}=={id(p) for p in new.values()}
    for n,(p,values) in old.items():
        assert torch.equal(new[n], p.flatten()[at[n]]) and p not in state and values
        for k,v in values.items(): assert torch.equal(state[new[n]][k], v.flatten()[at[n]])
    before = {n:p.detach().clone() for n,p in new.items()}
    learn.fit(1)
    assert not any(torch.equal(before[n], p) for n,p in learn.model.named_parameters())

def test_with_a_teacher_and_a_schedule(dls, quiet, tmp_path):
    net = wrn(10, 1)
    learn = distill_learner(dls, net, deepcopy(net), cbs=[KD(),AT()], path=tmp_path)
    seen = []
    class See(Callback):
        def after_batch(self): seen.append(self.learn.student.group2[0].conv1.out_channels)
    learn.fit(2, cbs=[ChannelPruning(combine_scheds([.6,.4], [SchedLin(0., .75),SchedNo(.75, .75)]), steps=3),See()])
    assert seen==sorted(seen, reverse=True) and len({*seen})==4 and seen[-1]==8
    assert net.group2[0].conv1.out_channels==32 and not n_hooks(learn.model)
    once,_ = prune_channels(net, 32, ratio=.75)
    assert [p.shape for p in learn.student.parameters()]==[p.shape for p in once.parameters()]
    learn.lr_find(show_plot=False, num_it=20)
    assert load_learner(learn.export_student()).model.group2[0].conv1.out_channels==8

def test_taylor_within_a_fit_and_global_ranking(dls, quiet):
    learn = distill_learner(dls, None, wrn(10, 1))
    learn.fit(1, cbs=ChannelPruning(.5, importance=importances['Taylor'], global_pruning=True))
    assert count_params(learn.model)<.75*count_params(wrn(10, 1))

def test_lr_find_prunes_nothing(dls, quiet, tmp_path):
    learn = distill_learner(dls, None, wrn(10, 1), cbs=[ChannelPruning(.5),Sparsify(.9)], path=tmp_path)
    learn.lr_find(show_plot=False, num_it=10)
    assert count_params(learn.model)==count_params(wrn(10, 1)) and all((m.weight!=0).all() for m in learn.model.modules() if isinstance(m, nn.Conv2d))

def small_net(n_out=10): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_out))

def test_many_small_steps_and_a_small_head(dls, quiet):
    learn = distill_learner(dls, None, small_net(2), loss_func=lambda p,y: CrossEntropyLossFlat()(p, y%2))
    learn.fit(4, cbs=ChannelPruning(SchedLin(0., .75), steps=50))
    assert learn.model[0].out_channels==4 and learn.model[-1].out_features==2

def test_validation_within_and_after_a_fit(dls, quiet):
    "fastai fires before_fit and after_fit for it"
    class Validates(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch<self.n_epoch-1: self.learn.get_preds(dl=self.dls.valid)
    learn = distill_learner(dls, None, small_net(), cbs=[ChannelPruning(.75, steps=2),Sparsify(.5, every=1)])
    learn.fit(4)
    assert learn.model[0].out_channels==4 and learn.validate() is not None and learn.model[0].out_channels==4
    weights = torch.cat([m.weight.flatten() for m in (learn.model[0],learn.model[3])])
    assert (weights==0).float().mean().item()==pytest.approx(.5, abs=.02)

def test_accumulated_gradients(dls, quiet):
    seen = []
    class See(Callback):
        order = Sparsify.order+1
        def after_step(self): seen.append((self.learn.model[0].weight==0).float().mean().item())
    learn = distill_learner(dls, None, small_net(), cbs=[GradientAccumulation(2*dls.bs),Sparsify(.9, every=1),See()])
    learn.fit(4)
    assert seen==sorted(seen) and len({*seen})>2
    pending,channels = [],[]
    def look(self):
        pending.append(any(p.grad is not None and bool(p.grad.any()) for p in self.learn.model.parameters()))
        channels.append(self.learn.model[0].out_channels)
    class Before(Callback): order,before_batch = ChannelPruning.order-1,look
    class After(Callback): order,before_batch = ChannelPruning.order+1,look
    learn = distill_learner(dls, None, small_net(), cbs=GradientAccumulation(2*dls.bs))
    learn.fit(4, cbs=[ChannelPruning(SchedLin(0., .75), steps=16),Before(),After()])
    changed = [i for i in range(0, len(channels), 2) if channels[i]!=channels[i+1]]
    assert any(pending[::2]) and len(changed)>3 and not any(pending[i] for i in changed)

def test_frozen_layers_have_importances_too(dls, quiet):
    net = small_net()
    for m in net[:4]: m.requires_grad_(False)
    learn = distill_learner(dls, None, net)
    learn.prune(.5, importance=importances['Taylor'])
    assert [p.requires_grad for p in net.parameters()]==[False]*6+[True]*2 and net[0].out_channels==8
    net.requires_grad_(False)
    small,_ = prune_channels(net, 32, ratio=.5)
    assert small[0].out_channels==4 and not any(p.requires_grad for p in small.parameters())

def test_lookahead_goes_on(dls, quiet):
    learn = distill_learner(dls, None, small_net(), opt_func=ranger)
    learn.fit(2)
    learn.prune(.5)
    learn.fit(2)

def zeros_in(net): return {n:(m.weight==0) for n,m in net.named_modules() if isinstance(m, (nn.Conv2d,nn.Linear))}

@pytest.mark.parametrize('by_layer', [True,False])
def test_masks_hold(by_layer, dls, quiet, tmp_path):
    "Through the steps of an optimizer with momentum and weight decay, a second fit, and export"
    seen = []
    class See(Callback):
        order = Sparsify.order+1
        def after_step(self): seen.append(zeros_in(self.model))
    learn = distill_learner(dls, None, wrn(10, 1), cbs=[Sparsify(.8, by_layer=by_layer, every=2, keep='group1.*'),See()], path=tmp_path)
    learn.fit(2, 1e-2)
    for a,b in zip(seen, seen[1:]): assert all((b[n] | ~a[n]).all() for n in a)
    last = zeros_in(learn.model)
    assert not last['fc'].any() and not last['group1.0.conv1'].any()
    names = [n for n in last if n!='fc' and not n.startswith('group1')]
    assert sum(last[n].sum() for n in names)/sum(last[n].numel() for n in names)==pytest.approx(.8, abs=1e-3)
    if by_layer: assert all(abs(last[n].float().mean()-.8)<.01 for n in names)
    learn.fit(1, 1e-2)
    assert all((zeros_in(learn.model)[n] | ~last[n]).all() for n in names)
    learn.export('a.pkl')
    again = load_learner(tmp_path/'a.pkl')
    assert all(torch.equal(v, zeros_in(learn.model)[n]) for n,v in zeros_in(again.model).items())
    assert not first(o for o in again.cbs if isinstance(o, Sparsify)).masks

def test_prune_curve(dls, quiet):
    learn = distill_learner(dls, None, wrn(10, 1), metrics=accuracy)
    before = deepcopy(learn.model.state_dict())
    seen = []
    def fit(o):
        seen.append(any(isinstance(cb, KD) for cb in o.cbs))
        o.fit(1)
    for teacher in (True,False): table = prune_curve(learn, [.25,.5], {'L2':None, 'random':importances['random']}, fit, teacher=teacher)
    assert seen==[True]*4+[False]*4 and [*table['method']]==['L2','L2','random','random'] and [*table['ratio']]==[.25,.5]*2
    assert (table['parameters'].diff().iloc[[1,3]]<0).all() and table[['before','after']].stack().between(0, 1).all()
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(3, 8, 3),nn.Linear(8, 10)
    def forward(self, x):
        with torch.no_grad(): return self.fc(self.conv(x).mean((2,3)))

class Fixed(Hidden):
    def forward(self, x): return self.fc(self.conv(x).mean((2,3)).view(-1, 8))

def tied():
    net = small_net()
    net[3].weight = nn.Parameter(torch.randn(16, 16, 3, 3))
    net.append(nn.Unflatten(1, (10,1,1))).append(nn.Conv2d(10, 16, 1)).append(nn.Conv2d(16, 16, 3, padding=1)).append(nn.Flatten())
    net[-2].weight = net[3].weight
    return net

def parametrized():
    net = small_net()
    nn.utils.parametrizations.weight_norm(net[0])
    return net

bad = [(lambda: wrn(10, 1), {}, 'Give exactly one of ratio, params, macs'), (tied, dict(ratio=.5), '3 cannot be pruned, since another layer shares its weights'), (parametrized, dict(ratio=.5), '0 cannot be pruned, since its weights are a function of others'),
    (lambda: wrn(10, 1), dict(ratio=.6, round_to=8), 'has 16 channels, of which a ratio of 0.6 would leave none in multiples of 8'), (lambda: wrn(10, 1), dict(ratio=.5, rounding=8), "Unknown option rounding: choose from global_pruning"),
    (lambda: wrn(10, 1), dict(params=100_000), 'The budget of 100,000 is out of reach: the settings cost .* to 77,850'), (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 16, 3, groups=4), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), dict(ratio=.5), 'channel dependencies of this network cannot be traced'), (lambda: wrn(10, 1), dict(ratio=1.), 'between 0 and 1, got 1.0'), (lambda: wrn(10, 1), dict(ratio=.99), 'channels, of which a ratio of 0.99 would leave none'),
    (lambda: wrn(10, 1), dict(params=10), 'The budget of 10 is out of reach'), (lambda: wrn(10, 1), dict(ratio=.5, keep='head'), 'keep names head, but no layer matches'),
    (Hidden, dict(ratio=.5), 'cannot be traced|does not require grad'), (lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 5)), dict(ratio=.5), 'shapes cannot be multiplied'),
    (lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), dict(ratio=.5), 'Nothing was pruned'), (lambda: quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))), dict(ratio=.5), '1 is quantized'),
    (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), dict(ratio=.5), '0 is a LazyConv2d, which has no weights yet')]

@pytest.mark.parametrize('make,kwargs,message', bad, ids=range(len(bad)))
def test_bad_input(make, kwargs, message, dls):
    net = make()
    with pytest.raises((ValueError,RuntimeError), match=message): prune_channels(net, 32, **kwargs)
    if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in net.modules()): return
    before = deepcopy(net.state_dict())
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    with pytest.raises((ValueError,RuntimeError), match=message): learn.prune(**kwargs)
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after if isinstance(after[k], Tensor)) and not n_hooks(net)

def test_callbacks_refuse_before_training(dls, quiet):
    for cb,message in ((ChannelPruning(.99), 'would leave none'), (ChannelPruning(.5, keep='head'), 'keep names head'), (Sparsify(.5, keep='*'), 'Nothing to sparsify')):
        learn = Learner(dls, wrn(10, 1))
        with pytest.raises(ValueError, match=message): learn.fit(1, cbs=cb)
        assert not n_hooks(learn.model) and count_params(learn.model)==count_params(wrn(10, 1))
    with pytest.raises(ValueError, match='between 0 and 1, got 1'): Sparsify(1)
    learn = distill_learner(dls, wrn(10, 2), wrn(10, 1), cbs=FitNet())
    learn.fit(1)
    with pytest.raises(ValueError, match='prune first, then add FitNet'): learn.prune(.5)

def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(ImportError, match=r'pip install kdfast\[prune\]'): prune_channels(wrn(10, 1), 32, ratio=.5)
