"Networks to a budget: never above, and never less than could be"
import functools, math, numpy as np, pytest
from fastai.vision.all import *
from kdfast.experiments import spec as words
from kdfast.all import *
from kinds import kinds

divisor = lambda name: 4 if 'size' not in name and any(o in name for o in ('Grouped','Shuffle','_grouped')) else {'Grouped_size':4, 'SeparableGrouped_size':2}.get(name, 1)

def by_width(name):
    "Two convolutions of one kind, as wide as the setting says"
    d,conv = divisor(name),kinds[name]
    return lambda s: nn.Sequential(nn.Conv2d(3, d*s, 1), conv(d*s, 2*d*s, 3, 2), conv(2*d*s, 2*d*s), nn.Conv2d(2*d*s, 10, 1))

def by_ratio(name): return lambda r: nn.Sequential(*(kinds[name].func(16, 32, ratio=r) for _ in range(2)))

cases = {**{k:(by_width(k), (4,96), 1) for k in kinds}, **{f'{k}_ratio':(by_ratio(k), (.02,1.), .98/2**20) for k in kinds if 'ratio' in getattr(kinds[k], 'keywords', {})},
    'depth':(lambda n: wrn(6*n+4, .25), (1,12), 1)}

@pytest.mark.slow
@pytest.mark.parametrize('name', cases)
def test_many_budgets(name):
    make,over,step = cases[name]
    real = functools.cache(lambda s: count_params(make(s)))
    low,high = sorted(real(s) for s in over)
    rising = real(over[0])<real(over[1])
    for budget in np.exp(np.random.default_rng(0).uniform(math.log(low), math.log(high), 15)).astype(int):
        fit = fit_budget(make, params=int(max(low, budget)), over=over)
        assert fit.count==count_params(fit.model)==real(fit.setting)<=max(low, budget)
        following = fit.setting+(step if rising else -step)
        if over[0]<=following<=over[1]: assert real(following)>budget or real(following)-fit.count<=0

@pytest.mark.parametrize('name', cases)
def test_out_of_reach(name):
    make,over,_ = cases[name]
    low,high = sorted(count_params(make(s)) for s in over)
    for budget in (low-1,high+1):
        with pytest.raises(ValueError, match=f'out of reach: the settings cost {low:,} to {high:,}'): fit_budget(make, params=budget, over=over)

def test_falling_costs_and_lists():
    make = lambda g: Grouped(64, 64, groups=g)
    fit = fit_budget(make, params=5000, over=[1,2,4,8,16,32,64])
    assert (fit.setting,fit.count)==(8,4608)
    assert fit_budget(make, params=4608, over=[1,2,4,8,16,32,64]).setting==8  # spent to the last parameter
    assert fit_budget(make, params=36864, over=[1,2,4,8]).setting==1

def test_few_builds_and_no_storage():
    built = []
    def make(s):
        net = wrn(10, s/64)
        built.append(next(net.parameters()).device.type)
        return net
    fit = fit_budget(make, params=200_000, over=(1,1024))
    assert built.count('cpu')==1 and len(built)<=14 and next(fit.model.parameters()).device.type=='cpu'

@pytest.mark.parametrize('read', [lambda w: float(w.sum()), lambda w: w.numpy().sum(), lambda w: sum(w.flatten().tolist())])
def test_a_network_that_cannot_be_built_without_storage(read):
    def make(s):
        net = nn.Conv2d(3, s, 3)
        if read(net.weight.detach())>1e9: raise AssertionError
        return net
    assert fit_budget(make, params=280, over=(1,64)).setting==10

def test_random_state_is_drawn_from_by_the_result_alone():
    torch.manual_seed(0)
    a = fit_budget(lambda s: wrn(10, s/64), params=50_000, over=(1,128))
    torch.manual_seed(0)
    for p,q in zip(a.model.parameters(), wrn(10, a.setting/64).parameters()): assert torch.equal(p, q)

@pytest.mark.parametrize('unit', ['macs','ms'])
def test_other_budgets(unit):
    make = lambda s: wrn(10, s/4)
    cost = dict(macs=count_macs)
    if unit=='macs':
        fit = fit_budget(make, macs=20_000_000, over=(1,16), size=32)
        assert fit.count==count_macs(fit.model, 32)<=20_000_000<count_macs(make(fit.setting+1), 32)
    else:
        costs = [float(compare({'net':make(s)}, 32).loc['net','ms per image']) for s in (1,16)]
        fit = fit_budget(make, ms=sum(costs)/2, over=(1,16), size=32)
        assert 1<=fit.setting<16 and 0<fit.count<=sum(costs)/2

@pytest.mark.parametrize('kwargs,message', [({}, 'Give exactly one'), (dict(params=9, macs=9), 'Give exactly one of params, macs, ms'), (dict(macs=100), 'size must be a side')])
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message): fit_budget(lambda s: nn.Linear(s, 1), **kwargs)

def test_settings_in_any_order(): assert fit_budget(lambda s: nn.Linear(s, 1), params=50, over=(64,1)).setting==fit_budget(lambda s: nn.Linear(s, 1), params=50, over=(1,64)).setting==49

def test_the_students_of_the_command():
    for spec,params in (('separable', 100_000), ('grouped:groups=4', 100_000), ('hashed', 100_000), ('shuffle:groups=4', 300_000), ('full', 300_000)):
        make,setting = words.student_at(words.network_of('wrn-16-2'), words.conv_of(spec), params)
        n = count_params(make(n_out=10))
        assert .95*params<n<=params and len(setting)==1
    make,_ = words.student_at(words.network_of('resnet18'), words.conv_of('separable'))
    assert count_params(make(n_out=10))==count_params(resnet(18, 10, conv=Separable, stem='small'))
    make,_ = words.student_at(words.network_of('torchvision.resnet34'), words.conv_of('separable'), n_out=10)
    assert any(isinstance(m, Separable) for m in make(n_out=10).modules())

@pytest.mark.parametrize('student,spec,params,message', [('wrn-16-2', 'sparable', None, "Unknown convolution 'sparable': choose from full, "), ('wrn-16-2', 'grouped:group=4', None, 'grouped has no group: it takes bias, groups, group_size'),
    ('torchvision.resnet18', 'separable', 10_000, 'cannot be fitted'), ('wrn-16-2', 'lowrank', 100_000, 'out of reach'), ('residual_cnn', 'separable', 10_000, 'cannot be fitted')])
def test_what_the_command_refuses(student, spec, params, message):
    with pytest.raises(ValueError, match=message): words.student_at(words.network_of(student), words.conv_of(spec), params)
