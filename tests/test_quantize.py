"Networks in 8-bit integers"
import io, pickle, pytest, torchvision
from fastai.vision.all import *
from kdfast.all import *
from kdfast.compress.quantize import _Rounding
from conftest import few_digits, n_hooks, slow_but
from test_benchmarks import int8_cost

@pytest.fixture
def dls(): return few_digits(size=32)

def relative(a, b): return ((a-b).norm()/b.norm()).item()

def settled(net, dls, n=3):
    "`net` with batch norms that have seen images"
    with torch.no_grad():
        for _ in range(n):
            for b in dls.train: net.train()(b[0].as_subclass(Tensor))
    return net.eval()

def images(dls): return torch.cat([b[0] for b in dls.valid]).as_subclass(Tensor)[:64]

nets = {'wrn': lambda: wrn(16, 1), 'separable': lambda: wrn(10, 1, conv=Separable), 'shuffle': lambda: wrn(10, 1, conv=Shuffle), 'dilated': lambda: wrn(10, 1, conv=Dilated2x2), 'grouped': lambda: wrn(10, 1, conv=partial(Grouped, groups=2)),
    'resnet': lambda: resnet(10, stem='small'), 'residual_cnn': residual_cnn, 'plain': lambda: plain_cnn(32), 'mobile': mobile, 'torchvision': lambda: torchvision.models.resnet18(num_classes=10), 'mobilenet_v2': lambda: torchvision.models.mobilenet_v2(num_classes=10)}

@pytest.mark.parametrize('name', slow_but('wrn', 'mobile', of=nets))
def test_outputs_are_near(name, dls):
    net = settled(nets[name](), dls)
    before,x = {k:v.clone() for k,v in net.state_dict().items()},images(dls)
    int8,report = quantize(net, dls)
    with torch.no_grad(): full,small,reference = net(x),int8(x),int8.reference(x)
    assert relative(small, full)<.2 and relative(reference, small)<.05
    assert set(report.precision)=={'int8'} and report.weights.sum()==sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d,nn.Linear)))
    assert count_macs(int8, 32)==count_macs(net, 32) and .97*count_params(net)<count_params(int8)<=count_params(net)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and not n_hooks(net) and not net.training

def test_int8_is_a_network_like_others(dls, tmp_path):
    int8,_ = quantize(settled(wrn(10, 1), dls), dls)
    x,f = images(dls),io.BytesIO()
    torch.save(int8, f)
    f.seek(0)
    for other in (deepcopy(int8), pickle.loads(pickle.dumps(int8)), torch.load(f, weights_only=False)):
        assert torch.equal(other(x), int8(x)) and torch.equal(other.reference(x), int8.reference(x)) and count_macs(other, 32)==count_macs(int8, 32)
    assert torch.equal(int8.half().to('meta').double()(x), int8(x))
    learn = Learner(dls, int8, metrics=accuracy, path=tmp_path)
    learn.export('int8.pkl')
    assert torch.equal(load_learner(tmp_path/'int8.pkl').model(x), int8(x))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(int8(x), int8(x.double()))

def test_the_reference_clips_nowhere_else(dls):
    "Images brighter than those that ranges were taken from, which a network without ranges does not clip at all"
    int8,_ = quantize(net := settled(wrn(10, 1), dls), dls)
    x = 1.7*images(dls)
    with torch.no_grad(): assert relative(int8.reference(x), int8(x))<.03 and relative(net(x), int8(x))>.06

@pytest.mark.parametrize('aware', [False,True])
def test_two_products_fit_in_16_bits(aware, dls, quiet):
    "Processors without VNNI add the products of weights and feature maps in pairs, in 16 bits, and stop at the greatest"
    learn = distill_learner(dls, None, wrn(10, 1))
    if aware:
        learn.quantize_aware(n=2)
        quiet(learn, 1, 1e-2)
    learn.quantize(n=2)
    weights = [m.weight().int_repr().float().abs().amax() for m in learn.model.net.modules() if callable(getattr(m, 'weight', None))]
    steps = [o.args[3:5] for o in learn.model.reference.graph.nodes if 'quantize_per_tensor' in str(o.target)]
    assert weights and {*map(int, weights)}=={63} and {*steps}=={(0,255)} and 2*255*63<2**15

@pytest.mark.parametrize('make,size', [(lambda: wrn(16, 1), 32), (lambda: resnet(10), 64)])
def test_faster_than_float32(make, size):
    net = make().eval()
    int8,_ = quantize(net, int8_cost.noise(size), n=1)
    ms = compare(dict(float32=net, bfloat16=int8_cost.InBF16(net), int8=int8), size, bs=64, reps=7)['ms per image']
    print(ms)
    assert ms['int8']<ms['float32']

def test_what_stays_in_floating_point(dls):
    _,report = quantize(wrn(10, 1, conv=partial(Hashed, ratio=.5)).eval(), dls)
    kept = report.set_index('layer').kept
    assert kept['group1.0.conv1']=='computes its weights in forward' and kept['stem']==''
    int8,report = quantize(wrn(10, 1).eval(), dls, keep=['group2*','fc'])
    by = report.set_index('layer')
    assert all((k.startswith('group2') or k=='fc')==(v=='float') for k,v in by.precision.items()) and by.kept['fc']=='kept as fc' and by.kept['group2.0.conv1']=='kept as group2*'
    assert isinstance(int8.net.get_submodule('fc'), nn.Linear)
    x = images(dls)
    with torch.no_grad(): assert relative(int8.reference(x), int8(x))<.05
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = int8(x)
    assert inside.dtype==torch.float32 and torch.equal(inside, int8(x))

def test_a_learner(dls, teacher, quiet, tmp_path):
    student = wrn(10, 1)
    learn = distill_learner(dls, teacher, student, [KD(),AT()], metrics=accuracy, path=tmp_path).to_bf16()
    quiet(learn, 2, 1e-2, how='fit_one_cycle')
    with learn.no_bar(): before = learn.validate()[1]
    state = dls.train.rng.getstate(),torch.get_rng_state()
    report = learn.quantize(n=2)
    assert dls.train.rng.getstate()==state[0] and torch.equal(torch.get_rng_state(), state[1])
    with learn.no_bar(): assert abs(learn.validate()[1]-before)<.1
    assert len(report)==10 and not any(isinstance(cb, (TeacherCallback,DistillCallback,MixedPrecision)) for cb in learn.cbs)
    preds,_ = learn.get_preds()
    again = load_learner(learn.export_student('int8.pkl'))
    x = images(dls)
    assert torch.equal(again.model(x), learn.model(x)) and len(preds)==len(dls.valid_ds)
    for l in (learn, Learner(dls, learn.model), Learner(dls, quantize(resnet(10, stem='small'), dls)[0])):
        with pytest.raises(ValueError, match='An int8 network cannot be trained: train first'): quiet(l, 1)
    with pytest.raises(ValueError, match='int8 already'): learn.quantize()

@pytest.mark.parametrize('bf16', [False,True])
def test_training_with_rounding(bf16, dls, teacher, quiet):
    calls = []
    teacher.register_forward_hook(lambda *a: calls.append(1))
    learn = distill_learner(dls, teacher, settled(wrn(10, 1), dls), metrics=accuracy)
    if bf16: learn.to_bf16()
    learn.quantize_aware(n=2)
    ranges = lambda: torch.cat([m.scale.flatten() for m in learn.student.modules() if isinstance(m, _Rounding)])
    begin = ranges()
    assert (begin>1e-7).all()
    with learn.no_bar(): learn.validate()
    assert torch.equal(ranges(), begin)
    calls.clear()
    weights = [p.detach().clone() for p in learn.student.parameters()]
    quiet(learn, 3, 3e-3)
    assert len(calls)>=3*len(dls.train) and not torch.equal(ranges(), begin)
    assert all((p-w).abs().max()>0 for p,w in zip(learn.student.parameters(), weights)) and 'kd' in learn.recorder.history
    x = images(dls)
    with torch.no_grad(): rounded = learn.student.eval()(x)
    learn.quantize()
    assert relative(learn.model(x), rounded)<.03 and relative(learn.model.reference(x), rounded)<.03
    assert (learn.model(x).argmax(1)==rounded.argmax(1)).float().mean()>.9

def test_rounding_lets_gradients_through():
    m = _Rounding.with_args(observer=torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)()
    x = torch.linspace(-1, 1, 101).requires_grad_()
    y = m(x)
    y.sum().backward()
    assert len(y.unique())<=256 and (y-x).abs().max()<=2/255 and x.grad.eq(1).float().mean()>.95
    assert m(x.bfloat16()).dtype==torch.bfloat16
    m.eval()
    m(100*x)
    assert m.activation_post_process.max_val<2

def of_shape(c, size, **kwargs):
    x,y = torch.randint(0, 255, (8,c,size,size), dtype=torch.uint8),torch.arange(8)
    return tensor_dls((x, y), (x, y), bs=4, **kwargs)

class Decides(nn.Module):
    def forward(self, x): return x if x.mean()>0 else -x

def undecided(): return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3, stride=2), middle=nn.Sequential(Decides()), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))

bad = {'quantize': (lambda learn,dls: learn.quantize(), undecided, 'cannot be traced at middle.0 .*keep='), 'aware': (lambda learn,dls: learn.quantize_aware(), undecided, 'cannot be traced at middle.0'),
    'shape': (lambda learn,dls: learn.quantize(dls=of_shape(3, 48)), lambda: wrn(10, 1), r'Calibration data has the shape \[\(3, 48, 48\)\]'), 'keep': (lambda learn,dls: learn.quantize(keep='head'), lambda: wrn(10, 1), 'keep names head'),
    'all kept': (lambda learn,dls: learn.quantize(keep='*'), lambda: wrn(10, 1), 'Nothing was quantized: stem')}

@pytest.mark.parametrize('name', bad)
def test_bad_input(name, dls, teacher):
    act,make,message = bad[name]
    learn = distill_learner(dls, teacher, make(), metrics=accuracy)
    learn.create_opt()
    model,opt,cbs,weights = learn.model,learn.opt,[*learn.cbs],{k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=message): act(learn, dls)
    assert learn.model is model and learn.opt is opt and [*learn.cbs]==cbs and model.training
    assert all(torch.equal(v, weights[k]) for k,v in model.state_dict().items())

def test_calibration_data_that_does_not_fit(dls):
    grey = of_shape(1, 32, stats=([.5],[.5]))
    with pytest.raises(RuntimeError, match=r'expected input\[4, 1, 32, 32\] to have 3 channels'): quantize(wrn(10, 1), grey)

def test_terms_that_read_stages(dls, teacher):
    learn = distill_learner(dls, teacher, wrn(10, 1), AT())
    model = learn.model
    with pytest.raises(ValueError, match='AT reads stages'): learn.quantize_aware()
    assert learn.model is model
    other = distill_learner(dls, teacher, wrn(10, 1))
    other.quantize_aware()
    with pytest.raises(ValueError, match='the student lost its stages to tracing'): distill_learner(dls, teacher, other.model, AT())

@pytest.mark.parametrize('aware', [False,True])
def test_nothing_comes_after(aware, dls, teacher):
    learn = distill_learner(dls, teacher, wrn(10, 1), metrics=accuracy)
    if aware: learn.quantize_aware()
    else: learn.quantize()
    model = learn.model
    for act in (lambda: learn.prune(.5), lambda: learn.factorize(ratio=.5), lambda: swap_convs(learn.model, Separable), lambda: learn.quantize_aware()):
        with pytest.raises(ValueError, match='quantized|prepared'): act()
    assert learn.model is model

class Drops(nn.Module):
    def forward(self, x): return F.dropout(x, .5, self.training)

def test_what_training_does_otherwise(dls, teacher, quiet):
    net = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3, stride=2), drop=Drops(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 10)))
    learn = distill_learner(dls, teacher, net)
    with pytest.raises(ValueError, match='behaves differently in training, at .*dropout.* use modules such as nn.Dropout'): learn.quantize_aware()
    assert learn.model is net and net.training
    learn.quantize_aware(keep='drop')
    quiet(learn, 1)
    report = learn.quantize()
    x = images(dls)
    assert torch.equal(learn.model(x), learn.model(x)) and set(report.precision)=={'int8'}

def test_what_is_kept_in_training_is_told(dls, teacher):
    learn = distill_learner(dls, teacher, wrn(10, 1))
    learn.quantize_aware(keep='fc')
    with pytest.raises(ValueError, match='quantize_aware has fixed'): learn.quantize(keep='stem')
    assert learn.quantize().set_index('layer').kept['fc']=='kept as fc'

def test_groups_of_parameters(dls, teacher, quiet):
    "A splitter that indexes the network has nothing to index any more"
    learn = distill_learner(dls, teacher, wrn(10, 1), splitter=lambda m: L(m[:3], m[3:]).map(params))
    learn.quantize_aware()
    quiet(learn, 1)
    learn.quantize()
    with pytest.raises(ValueError, match='cannot be trained'): quiet(learn, 1)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = wrn(10, 1)
    def forward(self, x): return self.net(x),x

def test_more_bad_input(dls):
    grey = wrn(10, 1, n_in=1)
    with pytest.raises(ValueError, match='Nothing to calibrate on'): quantize(wrn(10, 1), dls, n=0)
    with pytest.raises(ValueError, match='must output one tensor, got a tuple'): quantize(Two(), dls)
    before,order = torch.get_rng_state(),dls.train.rng.getstate()
    with pytest.raises(RuntimeError, match='to have 1 channels') as e: quantize(grey, dls)
    assert torch.equal(torch.get_rng_state(), before) and dls.train.rng.getstate()==order
    now = torch.manual_seed(77).get_state()
    del e
    assert torch.equal(torch.get_rng_state(), now)

class Pair(nn.Module):
    "A network of someone who likes the names that are used here"
    def __init__(self):
        super().__init__()
        self.net,self.reference,self.file,self.samples = wrn(10, 1),nn.Conv2d(3, 4, 1),'x',torch.zeros(3)
    def forward(self, x): return self.net(x)

def test_names_of_others(tmp_path):
    pair,net = Pair().eval(),wrn(10, 1)
    assert count_params(pair)==count_params(net)+16 and count_macs(pair, 32)==count_macs(net, 32)
    assert compare({'it':pair}, 32, reps=1).loc['it','MB on disk']>.3
    export_onnx(pair, tmp_path/'net.onnx', 32)
