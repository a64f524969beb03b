"The published forms of methods, each by its keyword, against the formulas of papers and their authors' code"
import numpy as np, pytest
from conftest import few_digits
from fastai.vision.all import *
from kdfast.all import *
from kdfast.distill.features import Reuse
from kdfast.layers.adapters import adapters_of
from kdfast.losses.features import kdsvd_loss
from kdfast.losses.relations import crd_loss, rkd_loss

class Look(Callback):
    "The first step of a learner: its images, what the student shows at its taps, what each term added; then the fit stops"
    def after_pred(self): self.seen,self.taps = self.x.as_subclass(Tensor),{k:v.detach() for k,v in self.learn.teacher.student_taps.outs.items()}
    def before_step(self):
        self.added = {t.label:t.value.item() for t in self.learn.teacher.terms}
        raise CancelFitException

def first_step(teacher, student, *terms, **kwargs):
    set_seed(0)
    dls = few_digits(pad=0)
    dls.train.rng.seed(0)
    learn = distill_learner(dls, teacher, student, cbs=[*terms, Look()], precision='float32', **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn,learn.look

def shown(net, x, *layers, given=()):
    "What `layers` of `net` output, and those of `given` take"
    outs,handles = {},[]
    def keep(n, o): outs[n] = o.clone()
    for n in layers: handles.append(net.get_submodule(n).register_forward_hook(lambda m,i,o,n=n: keep(n, o)))
    for n in given: handles.append(net.get_submodule(n).register_forward_pre_hook(lambda m,i,n=n: keep(n, i[0])))
    with torch.no_grad(): net(x)
    for h in handles: h.remove()
    return [outs[n] for n in (*layers,*given)]

# A teacher in training mode

def by_hand_ofd(s, t, norm):
    "In float64: distance to what a ReLU passes on, or to the margin, which is the mean of what is below zero"
    s,t,mean,std = (o.double() for o in (s,t,norm.bias,norm.weight.abs()))
    cdf = (1+torch.erf(-mean/std/2**.5))/2
    margin = torch.where(cdf>1e-3, mean - std*torch.exp(-(mean/std)**2/2)/(2*np.pi)**.5/cdf, -3*std)[:,None,None]
    loss = (s-margin)**2*((s>margin)&(t<=margin)) + (s-t)**2*((s>t)&(t>margin)&(t<=0)) + (s-t)**2*(t>0)
    return loss.sum().item()/len(s)

def test_ofd_with_a_teacher_in_training_mode(trained):
    before,values,norms = {k:v.clone() for k,v in trained.state_dict().items()},{},['group2.0.bn1','group3.0.bn1','bn']
    for mode in (False,True):
        learn,look = first_step(trained, wrn(10, 1), OFD(weight=1e-3, train_mode=mode))
        theirs = shown(deepcopy(trained).train(mode), look.seen, *norms)
        ours = [adapters_of(learn.model)['ofd_'+n.replace('.', '_')](look.taps[n]).detach() for n in norms]
        hand = sum(by_hand_ofd(s, t, trained.get_submodule(n))/2**(2-i) for i,(s,t,n) in enumerate(zip(ours, theirs, norms)))/1000
        values[mode] = look.added['ofd']
        assert values[mode]==pytest.approx(hand, rel=1e-4) and learn.teacher.frozen.net.training==mode
    assert values[True]!=values[False] and all(torch.equal(v, before[k]) for k,v in trained.state_dict().items())

def test_terms_beside_read_the_same_teacher(trained):
    learn,look = first_step(trained, wrn(10, 1), KD(), OFD(weight=1e-3, train_mode=True))
    assert 'run as a copy in training mode' in learn.show_distill()
    with torch.no_grad(): torch.testing.assert_close(learn.teacher.answer(look.seen)[0], deepcopy(trained).train()(look.seen), rtol=1e-3, atol=1e-3)
    learn.remove_cb(learn.ofd)
    learn.fit(1, 1e-3)
    assert not learn.teacher.frozen.net.training

def fixed_teacher(cb, layers, outputs, xb): raise AssertionError("not asked")

def test_what_cannot_answer_in_training_mode(trained, tmp_path, quiet):
    learn = distill_learner(few_digits(pad=0), trained, wrn(10, 1), cbs=[OFD(train_mode=True), TeacherCache(tmp_path/'c')])
    with pytest.raises(ValueError, match='ofd runs the teacher in training mode, which a TeacherCache cannot'): quiet(learn, 1, 1e-3)
    learn = distill_learner(few_digits(pad=0), trained, wrn(10, 1), cbs=OFD(train_mode=True), precision=fixed_teacher)
    with pytest.raises(ValueError, match='which precision=fixed_teacher cannot'): quiet(learn, 1, 1e-3)

# Before the activation

def by_hand_pyramid(s, t):
    s,t,res,tot = s.double(),t.double(),0.,0.
    for k,n in enumerate([s.shape[2], *(o for o in (4,2,1) if o<s.shape[2])]):
        res,tot = res + .5**k*((F.adaptive_avg_pool2d(s, n)-F.adaptive_avg_pool2d(t, n))**2).mean().item(),tot+.5**k
    return res/tot

def test_review_before_the_activation_of_a_wrn(trained):
    "The teacher's stages through the norms that follow them; the student's as they are"
    values = {}
    for preact in (False,True):
        learn,look = first_step(trained, wrn(10, 1), ReviewKD(weight=1., ramp=0., preact=preact))
        *groups,pooled = shown(trained.eval(), look.seen, 'group1', 'group2', 'group3', 'pool')
        norms = [trained.get_submodule(n) for n in ('group2.0.bn1','group3.0.bn1','bn')]
        with torch.no_grad():
            theirs = [*([f(o) for f,o in zip(norms, groups)] if preact else groups), pooled]
            ours = adapters_of(learn.model)['reviewkd_review']([look.taps[n] for n in ('group1','group2','group3','pool')])
        values[preact] = look.added['reviewkd']
        assert values[preact]==pytest.approx(sum(map(by_hand_pyramid, ours, theirs)), rel=1e-4)
    assert abs(values[True]/values[False]-1)>.01

@pytest.mark.parametrize('student', [False,True])
def test_review_before_the_activation_of_resnets(student):
    "Before the last ReLU of a stage, that of the student too where it is wanted"
    set_seed(0)
    teacher,net = (models.resnet18(num_classes=10) for _ in range(2))
    x = torch.randn(16, 3, 64, 64)
    for n in (teacher,net): n(x)  # so that the norms have statistics
    learn = distill_learner(tensor_dls(*[((x*40+128).clamp(0, 255).byte(), [*range(10),*range(6)])]*2, bs=8), teacher, net,
        cbs=[ReviewKD(weight=1., ramp=0., preact=True, student_preact=student), Look()], precision='float32')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    def before(m, x):
        a,b = m[0](x),m[1]
        return b.bn2(b.conv2(F.relu(b.bn1(b.conv1(a))))) + a
    with torch.no_grad():
        t,y,theirs = teacher.eval(),learn.look.seen,[]
        y = t.maxpool(F.relu(t.bn1(t.conv1(y))))
        for i in range(1, 5):
            pre = before(getattr(t, f'layer{i}'), y)
            y,theirs = F.relu(pre),[*theirs,pre]
        theirs.append(t.avgpool(y))
        taps = learn.look.taps
        assert [(v<0).any().item() for v in taps.values()][:4]==[student]*4 and [*taps]==[*learn.reviewkd.layers]
        ours = adapters_of(learn.model)['reviewkd_review']([*taps.values()])
    assert [b.endswith(':in') for b in learn.reviewkd.layers.values()]==[True]*4+[False]
    assert learn.look.added['reviewkd']==pytest.approx(sum(map(by_hand_pyramid, ours, theirs)), rel=1e-4)

# Regressors

@pytest.mark.parametrize('norm', [False,True])
@pytest.mark.parametrize('pair', [{'group2':'group2'}, {'group1':'group2'}], ids=['one size','two sizes'])
def test_the_regressors_of_hints(norm, pair, trained):
    (a,b), = pair.items()
    learn,look = first_step(trained, wrn(10, 1), FitNet(pair, weight=100., relu=True, norm=norm))
    adapter,(t,) = adapters_of(learn.model)[f'fitnet_{a}'],shown(trained.eval(), look.seen, b)
    conv = adapter[0]
    assert conv.bias is not None and len(adapter)==2+norm
    s = F.conv2d(look.taps[a].double(), conv.weight.double(), conv.bias.double(), stride=2 if a!=b else 1)
    if norm: s = (s-s.mean((0,2,3), keepdim=True))/(s.var((0,2,3), keepdim=True, correction=0)+1e-5).sqrt()
    assert look.added['fitnet']==pytest.approx(100*((s.clamp(min=0)-t)**2).mean().item(), rel=1e-4)

def test_hints_between_equal_shapes(trained):
    learn,_ = first_step(trained, wrn(10, 2), FitNet(weight=100.))
    assert not adapters_of(learn.model)
    learn,_ = first_step(trained, wrn(10, 2), FitNet(weight=100., relu=True))
    assert len(adapters_of(learn.model))==3

@pytest.mark.parametrize('pair', [{'group1':'group2'}, {'group2':'group1'}], ids=['larger student','smaller student'])
def test_vid_pools_first(pair, trained):
    "The larger of both, and three convolutions of 1x1 at the smaller size"
    (a,b), = pair.items()
    values = []
    for pool_first in (False,True):
        learn,look = first_step(trained, wrn(10, 1), VID(pair, weight=1/3, pool_first=pool_first))
        values.append(look.added['vid'])
    s,(t,),m = look.taps[a],shown(trained.eval(), look.seen, b),adapters_of(learn.model)[f'vid_{a}']
    convs = [o.weight.double() for o in m.mean if isinstance(o, nn.Conv2d)]
    s,t = (F.adaptive_avg_pool2d(o.double(), 8) for o in (s,t))
    mean = F.conv2d(F.conv2d(F.conv2d(s, convs[0]).relu(), convs[1]).relu(), convs[2])
    var = (m.rho.double().exp()+1).log()[:,None,None] + 1e-5
    assert values[1]==pytest.approx((((mean-t)**2/var + var.log()).mean()/2).item(), rel=1e-5) and values[0]!=pytest.approx(values[1], rel=5e-5)

def test_simkd_pools_first(tmp_path, quiet):
    "Before the projector, at inference as well"
    set_seed(0)
    teacher,learns = resnet(10, stem='small', width=.25),{}
    for pool_first in (False,True): learns[pool_first],look = first_step(teacher, wrn(10, 1), SimKD(pool_first=pool_first))
    learn = learns[True]
    net,bn = learn.student,lambda x: (x-x.mean((0,2,3), keepdim=True))/(x.var((0,2,3), keepdim=True, correction=0)+1e-5).sqrt()
    assert type(net) is Reuse and {k:v.shape for k,v in learns[False].student.classifier.state_dict().items()}=={k:v.shape for k,v in net.classifier.state_dict().items()}
    weights = [m.weight.double() for m in net.projector.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        body,(theirs,) = net.body.train()(look.seen).double(),shown(teacher.eval(), look.seen, 'layer4')
        s = F.adaptive_avg_pool2d(body, 2)
        for w in weights: s = bn(F.conv2d(s, w, padding=w.shape[2]//2)).relu()
    assert (body.shape[2],theirs.shape[2])==(4,2)
    assert look.added['simkd']==pytest.approx(((s-theirs)**2).mean().item(), rel=1e-4) and learns[False].look.added['simkd']!=pytest.approx(look.added['simkd'], rel=1e-3)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(): assert torch.allclose(net.eval()(x), net.classifier(net.projector[1:](F.avg_pool2d(net.body(x), 2)).mean((2,3))), atol=1e-5)

# Relations

def by_hand_distances(x, all_pairs):
    d = np.array([[np.linalg.norm(a-b) for b in x] for a in x])
    if not all_pairs: return d/d[d>0].mean()
    d = np.where(np.eye(len(x))>0, 0, np.maximum(d, 1e-6))  # what the authors' code makes of zeros
    return d/d[d>0].mean()

@pytest.mark.parametrize('all_pairs', [False,True])
def test_rkd_with_an_image_twice(all_pairs):
    s,t = torch.randn(6,5).double(),torch.randn(6,8).double()
    s[3],t[5] = s[0],t[2]
    d = np.abs(by_hand_distances(s.numpy(), all_pairs)-by_hand_distances(t.numpy(), all_pairs))
    hand = np.where(d<1, d**2/2, d-.5).mean()
    assert rkd_loss(s, t, angle=0, all_pairs=all_pairs).item()/25==pytest.approx(hand, rel=1e-5)
    assert rkd_loss(s, t, angle=0, all_pairs=not all_pairs).item()/25!=pytest.approx(hand, rel=1e-3)

def test_rkd_passes_it_on(trained):
    assert [RKD(all_pairs=o).func.keywords['all_pairs'] for o in (False,True)]==[False,True]
    for n in (1,2): assert rkd_loss(torch.ones(n,3), torch.randn(n,3), all_pairs=True).isfinite()

def by_hand_columns(s, t):
    "One image: the first right singular vector of channels and lines by columns"
    def pair(a, b):
        v,w = (np.linalg.svd(o.reshape(-1, o.shape[2]))[2][:n].T for o,n in ((a,4),(b,1)))
        w = w*np.sign(w[np.abs(w).argmax()])
        cos = (v.T@w)[:,0]
        i = np.abs(cos).argmax()
        return v[:,i]*np.sign(cos[i]),w[:,0]
    rbf = lambda a,b: np.exp(-(a[:,None]-b[None])**2/8)
    (v1,w1),(v2,w2) = pair(s[0], t[0]),pair(s[1], t[1])
    return ((rbf(v1, v2)-rbf(w1, w2))**2).sum()

def test_kdsvd_over_columns(trained):
    s,t = ([torch.randn(3,c,8,8).double(),torch.randn(3,2*c,4,4).double()] for c in (5,7))
    hand = np.mean([by_hand_columns([o[i].numpy() for o in s], [o[i].numpy() for o in t]) for i in range(3)])
    assert kdsvd_loss(*s, *t, columns=True).item()==pytest.approx(hand, rel=1e-6)
    learn,look = first_step(trained, wrn(10, 1), KDSVD(weight=1., columns=True, stem=False))
    groups = ['group1','group2','group3']
    theirs,ours = shown(trained.eval(), look.seen, *groups),[look.taps[n] for n in groups]
    hand = sum(np.mean([by_hand_columns([o[i].double().numpy() for o in ours[j:j+2]], [o[i].double().numpy() for o in theirs[j:j+2]])
        for i in range(len(look.seen))]) for j in range(2))
    assert not adapters_of(learn.model) and look.added['kdsvd']==pytest.approx(hand, rel=1e-3)

def test_contrast_in_float64():
    "To its last digits, which a share in float32 would spoil"
    p,q = torch.randn(3).double(),torch.randn(3,7).double()
    valid = torch.ones(3,7).bool()
    valid[0,:2] = False
    hand = 0.
    for i in range(3):
        m = valid[i].sum().item()/11
        x = [np.exp(o.item()) for o in q[i][valid[i]]]
        hand -= np.log(np.exp(p[i].item())/(np.exp(p[i].item())+m)) + sum(np.log(m/(o+m)) for o in x)
    assert crd_loss(p, q, 11, valid).item()==pytest.approx(hand/3, rel=1e-13)
