"What every kind of convolution promises"
import itertools, pickle, pytest, torch, torch.nn.functional as F
from math import log2
import functools, math, torchvision.models as tvm
from fastai.vision.all import *
from kdfast.all import *
from kdfast.models.convs import init_he
from kinds import kinds

each = pytest.mark.parametrize('conv', kinds.values(), ids=kinds)

@each
def test_sizes(conv):
    for ni,nf in ((8,8),(8,16),(16,8)):
        for ks,stride,size,bias in itertools.product((1,3,5), (1,2), (7,8), (False,True)):
            x = torch.randn(2, ni, size, size)
            assert conv(ni, nf, ks, stride, bias=bias)(x).shape==Full(ni, nf, ks, stride)(x).shape

@each
def test_bias(conv):
    c,x = init_he(conv(8, 16, 3, bias=True)).eval(),torch.randn(2,8,6,6)
    before = c(x)
    *_,bias = [p for n,p in c.named_parameters() if n.endswith('bias')]
    with torch.no_grad(): bias.add_(1)
    assert torch.allclose(c(x), before+1, atol=1e-5)

@each
@pytest.mark.parametrize('ni,nf', [(32,32),(32,64),(64,32)])
def test_variance(conv, ni, nf):
    "Within a factor 2 of the full convolution's, on what a ReLU puts out"
    torch.manual_seed(0)
    x = torch.randn(32,ni,8,8).relu()
    for ks in (1,3):
        ours,full = (torch.stack([init_he(c(ni, nf, ks))(x).var() for _ in range(12)]).mean() for c in (conv,Full))
        assert .5<ours/full<2, f'{ks}: {ours/full:.2f}'

@each
def test_initialization_by_the_layer_is_that_of_the_network(conv):
    net = wrn(10, 1, conv=conv)
    for m in net.modules():
        if hasattr(m, 'bias') and m.bias is not None and not isinstance(m, nn.Linear): assert not m.bias.any()

@each
def test_autocast_and_memory_format(conv):
    torch.manual_seed(0)
    c,x = init_he(conv(8, 16, 3, 2)).eval(),torch.randn(4,8,9,9)
    y = c(x)
    last = deepcopy(c).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert torch.allclose(last, y, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): half = c(x)
    assert half.dtype==torch.bfloat16 and (half.float()-y).abs().max()<.05*y.abs().max()
    with torch.autocast('cpu', torch.bfloat16): c.train()(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype==torch.float32 and p.grad.isfinite().all() for p in c.parameters())

@each
def test_every_number_learns(conv):
    "No parameter is left without a gradient, no hashed number unused"
    torch.manual_seed(0)
    c = init_he(conv(8, 16, 3))
    (c(torch.randn(16,8,8,8))*torch.randn(16,16,8,8)).sum().backward()
    assert all((p.grad!=0).all() for n,p in c.named_parameters() if n.split('.')[-1]!='bias')

@each
def test_copies(conv):
    "deepcopy, pickle and state dict give the same outputs"
    c,x = init_he(conv(8, 16, 3)).eval(),torch.randn(2,8,6,6)
    other = init_he(conv(8, 16, 3)).eval()
    assert not torch.allclose(other(x), c(x))
    other.load_state_dict(c.state_dict())
    for o in (other, deepcopy(c), pickle.loads(pickle.dumps(c))): assert torch.equal(o(x), c(x))

@each
def test_compile_and_export(conv):
    torch._dynamo.reset()
    c,x = init_he(conv(8, 16, 3, 2)).eval(),torch.randn(2,8,6,6)
    assert torch.allclose(torch.compile(c, fullgraph=True, backend='aot_eager')(x), c(x), atol=1e-5)
    batch = torch.export.Dim('batch', min=2)
    exported = torch.export.export(c, (x,), dynamic_shapes=({0:batch},)).module()
    more = torch.randn(5,8,6,6)
    assert torch.allclose(exported(more), c(more), atol=1e-5)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['Hashed','ACDC'])
def test_compile_to_machine_code(name):
    "The two with operations that are no convolutions"
    c,x = init_he(kinds[name](8, 16, 3)),torch.randn(2,8,6,6)
    fast = torch.compile(deepcopy(c))
    for o in (c,fast): o(x).square().sum().backward()
    for a,b in zip(c.parameters(), fast.parameters()): assert torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-3)

@pytest.mark.slow
@each
def test_wrn_40_2(conv, tmp_path):
    "Builds, trains a step, is exported; a shallower one is traced, since that takes as long as the network is deep"
    images = torch.randint(0, 256, (10,3,16,16), dtype=torch.uint8),[*range(10)]
    net,dls = wrn(40, 2, conv=conv),tensor_dls(images, images, bs=10, path=tmp_path)
    learn,before = distill_learner(dls, None, net),[p.detach().clone() for p in net.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert all(p.isfinite().all() for p in net.parameters()) and sum(not torch.equal(p, b) for p,b in zip(net.parameters(), before))>.9*len(before)
    x,shallow = torch.randn(2,3,16,16),wrn(10, 2, conv=conv).eval()
    for o,net in ((load_learner(learn.export_student()).model.eval(),net.eval()), (torch.export.export(shallow, (x,)).module(),shallow)): assert torch.allclose(o(x), net(x), atol=1e-4)

# Numbers of a convolution from ni to nf channels, batch norms not counted, in closed form
dw = lambda ni: 9*ni
forms = dict(Full=lambda i,o: 9*i*o, Dilated2x2=lambda i,o: 4*i*o, Grouped=lambda i,o: 9*i*o//4, Grouped_size=lambda i,o: 9*4*o, Separable=lambda i,o: dw(i)+i*o, Separable_linear=lambda i,o: dw(i)+i*o,
    SeparableGrouped=lambda i,o: 9*i*i//4+i*o, SeparableGrouped_size=lambda i,o: 9*2*i+i*o, Bottleneck=lambda i,o: i*o//4+9*(o//4)**2+o//4*o, Bottleneck_grouped=lambda i,o: i*o//2+9*(o//2)**2//2+o//2*o,
    Bottleneck_depthwise=lambda i,o: i*o//2+9*o//2+o//2*o, SeparableChannelwise=lambda i,o: dw(i)+3*max(1, o//i), Shuffle=lambda i,o: i*o//4+dw(o)+o*o//4, LowRank=lambda i,o: dw(i)+(i+o)*(i*o//2//(i+o)),
    LowRank_rank=lambda i,o: dw(i)+3*(i+o), Hashed=lambda i,o: 9*i*o//10, Hashed_budget=lambda i,o: 32, SeparableHashed=lambda i,o: dw(i)+i*o//2, ACDC=lambda i,o: dw(i)+4*2*max(i,o))

@pytest.mark.parametrize('name', forms)
@pytest.mark.parametrize('ni,nf', [(16,16),(16,64),(64,16)])
def test_parameters(name, ni, nf):
    c = kinds[name](ni, nf)
    assert sum(p.numel() for p in c.parameters() if p.requires_grad) - sum(count_params(m) for m in c.modules() if isinstance(m, nn.BatchNorm2d))==forms[name](ni, nf)
    if name!='Full': assert c.compression==forms[name](ni, nf)/(9*ni*nf)

def test_factorized_parameters():
    "16 channels are 4*4, 64 are 8*8 to CP and Tucker; 2*2*4 and 4*4*4 to the tensor train"
    count = lambda kind, *size: count_params(kinds[kind](*size, 1))
    assert count('CP', 16, 64)==512//(4+4+8+8)*(4+4+8+8)
    half = lambda f: math.prod(int(f*d) for d in (8,8,4,4)) + sum(d*int(f*d) for d in (8,8,4,4))
    assert count('Tucker', 16, 64)==half(.75) and half(.75)<=512<half(.875)
    chain = lambda r,s: 4*4*r + r*4*2*s + s*4*2  # outputs 4,4,4 with inputs 4,2,2
    assert count('TensorTrain', 16, 64)==max(chain(min(r, 16), min(r, 8)) for r in range(1, 17) if chain(min(r, 16), min(r, 8))<=512)

@pytest.mark.parametrize('name', ['TensorTrain','Tucker','CP'])
def test_a_factorized_matrix_is_the_sum_that_it_stands_for(name):
    "Every entry, from loops over the ranks"
    m = kinds[name](8, 12, 1)[0].double()
    w,fs = m.weights()[-1] if len(m.weights())==1 else functools.reduce(lambda a,b: b@a, m.weights()),None
    for o,i in itertools.product(range(12), range(8)):
        if name=='TensorTrain':
            (a,b,c),(d,e,f) = m.outs,m.ins
            (o1,o2,o3),(i1,i2,i3) = np.unravel_index(o, (a,b,c)),np.unravel_index(i, (d,e,f))
            l,mid,r = m.cores
            by_hand = l[o1*d+i1] @ mid[:,(o2*e+i2)*len(r):(o2*e+i2+1)*len(r)] @ r[:,o3*f+i3]
        else:
            a,b,c,d = m.factors
            (o1,o2),(i1,i2) = divmod(o, len(b)),divmod(i, len(d))
            if name=='CP': by_hand = (a[o1]*b[o2]*c[i1]*d[i2]).sum()
            else: by_hand = torch.kron(a[o1], b[o2]) @ m.core @ torch.kron(c[i1], d[i2])
        assert torch.allclose(w[o,i], by_hand)

def convolutions(ni, nf, ks, pixels): return ni*nf*ks*ks*pixels

def test_multiply_adds():
    "Closed forms: what torch counts, and what the layer tells"
    size,n = (16,8,8),64
    count = lambda c: count_macs(c, size, parts=True)
    known = lambda c: count(c)['convolutions and products']
    depth = 9*16*n
    assert known(kinds['Separable'](16, 32))==depth+16*32*n
    assert known(kinds['Shuffle'](16, 32))==16*32//4*n+9*32*n+32*32//4*n
    assert known(kinds['LowRank_rank'](16, 32))==depth+3*(16+32)*n
    assert count(kinds['Hashed'](16, 32))=={'convolutions and products':9*16*32*n, 'gather':9*16*32}
    assert count(kinds['SeparableHashed'](16, 32))=={'convolutions and products':depth+16*32*n, 'gather':16*32}
    assert count(kinds['SeparableChannelwise'](16, 32))=={'convolutions and products':depth+16*32*n, 'gather':16*32}
    assert count(kinds['ACDC'](16, 32))=={'convolutions and products':depth+16*32*n, 'FFT':16*4*2*round(2.5*32*log2(32)), 'diagonals':16*4*4*32}
    cp = kinds['CP'](16, 64)
    rank = cp[-1].factors[0].shape[1]
    assert known(cp)==depth + min(rank*(16+64)*n, rank*16*64 + 16*64*n)
    assert count_macs(kinds['ACDC'](16, 32), size)==sum(count(kinds['ACDC'](16, 32)).values())

def test_hooks_of_the_counter_are_gone_after_an_error():
    c = kinds['Hashed'](16, 32)
    with pytest.raises(RuntimeError): count_macs(c, (3,8,8))
    assert not c._forward_hooks

def test_the_hash_is_the_same_everywhere():
    "A checkpoint holds no index, so the index may never change"
    from kdfast.models.structured import _hash, _shared_index
    assert _hash(6).tolist()==[0,824515495,1722258072,3753300549,3444516145,592649042] and _shared_index(12, 5).tolist()==[0,9,2,6,5,1,0,7,8,6,4,3]
    torch.manual_seed(1)
    a = Hashed(8, 8, ratio=.2).index
    torch.manual_seed(2)
    assert torch.equal(a, Hashed(8, 8, ratio=.2).index) and 'index' not in Hashed(8, 8, ratio=.2).state_dict()

def test_hashed_signs_and_places_look_random():
    index,n = Hashed(64, 64, ratio=.1).index.long(),3686
    sign,place = index//n,index%n
    assert abs(sign.float().mean()-.5)<.01 and place.bincount(minlength=n).min()>=10 and place.bincount().max()<=11
    assert abs(np.corrcoef(place, np.arange(len(place)))[0,1])<.02 and abs(np.corrcoef(place[1:], place[:-1])[0,1])<.02

@pytest.mark.slow
def test_the_research_counts():
    assert count_params(wrn(28, 10, conv=partial(Hashed, ratio=.1)))==3_902_938
    assert count_params(wrn(28, 10, conv=partial(Hashed, ratio=.1, bias=True)))==3_911_898
    assert count_params(swap_convs(tvm.resnet34(), Separable)[0], buffers=True)==3_163_752

bad = [(partial(Grouped, groups=5), 'groups=5 does not divide 16 channels in and 32 out'), (partial(Grouped, group_size=3), 'group_size=3 does not divide'), (Grouped, 'one of groups, group_size'),
    (partial(Grouped, groups=2, group_size=8), 'one of groups, group_size'), (partial(Grouped, groups=0), 'groups=0'), (partial(SeparableGrouped, groups=3), 'groups=3 does not divide 16'),
    (partial(Shuffle, groups=3), 'groups=3 does not divide'), (partial(Bottleneck, b=.5), 'b of at least 1'), (partial(SeparableChannelwise, taps=2), 'odd number'), (partial(LowRank, rank=17), 'between 1 and 16, got rank=17'),
    (partial(LowRank, rank=0), 'between 1 and 16'), (LowRank, 'one of rank, ratio'), (partial(Hashed, budget=9*16*32+1), '4608 weights'), (Hashed, 'one of ratio, budget'), (partial(Hashed, budget=0), 'got budget=0'),
    (partial(ACDC, n_layers=0), 'at least one layer'), *((partial(k, ratio=r), f'above 0 and at most 1, got {r}') for k in (LowRank,Hashed,SeparableHashed,TensorTrain,Tucker,CP) for r in (0,1.5,-.1))]

@pytest.mark.parametrize('conv,message', bad, ids=range(len(bad)))
def test_bad_input(conv, message):
    with pytest.raises(ValueError, match=message): conv(16, 32)
