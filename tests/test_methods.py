"Every loss against an independent computation, and every method alone and together"
import pytest, torchvision
from torch.autograd import gradcheck
from conftest import few_digits, n_hooks, slow_but, waits_of
from fastai.vision.all import *
from kdfast.all import *
from kdfast.distill.features import Reuse
from kdfast.distill.relations import ContrastMemory
from kdfast.layers.adapters import adapters_of
from kdfast.layers.pairs import before_relu
from kdfast.layers.taps import calls_of
from kdfast.losses.core import at_least_float, at_loss, hint_loss, kd_loss
from kdfast.losses.features import ab_loss, fsp_loss, ft_loss, kdsvd_loss, ofd_loss, pyramid_loss, vid_loss
from kdfast.losses.logits import cskd_loss, dist_loss, dkd_loss, logits_loss, mlkd_loss, nkd_loss, ofa_loss, sigmoid_kd_loss, standardize, tfkd_loss, wttm_loss
from kdfast.losses.relations import cc_loss, ickd_loss, nst_loss, pkt_loss, rkd_loss, sp_loss
from kdfast.losses.similarity import cosine_loss, global_similarity_loss, local_similarity_loss, vkd_loss
from kdfast.teacher.plan import NoTeacher
from kdfast.experiments.spec import methods, terms_of
from kdfast.experiments.run import learner_of, Run

# By hand, in NumPy

def soft(z, T=1., axis=1):
    e = np.exp(z/T - (z/T).max(axis, keepdims=True))
    return e/e.sum(axis, keepdims=True)

def kl(p, q): return sum(a*(np.log(a)-np.log(b)) for a,b in zip(p, q) if a>0)

def mean_of(f, *arrays): return np.mean([f(*o) for o in zip(*arrays)])

def unit(x, axis=-1): return x/np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-12)

def pooled(x): return x.reshape(*x.shape[:2], -1).mean(2)

def corr(a, b): return np.corrcoef(a, b)[0,1]

def by_hand_kd(s, t, T=4.): return T**2*mean_of(lambda a,b: kl(soft(b[None], T)[0], soft(a[None], T)[0]), s, t)

def by_hand_dkd(s, t, y, alpha=1., beta=8., T=4.):
    def one(a, b, y):
        p,q = soft(b[None], T)[0],soft(a[None], T)[0]
        rest = [i for i in range(len(p)) if i!=y]
        return alpha*kl([p[y],p[rest].sum()], [q[y],q[rest].sum()]) + beta*kl(p[rest]/p[rest].sum(), q[rest]/q[rest].sum())
    return T**2*mean_of(one, s, t, y)

def by_hand_nkd(s, t, y, gamma=1.5, T=1.):
    def one(a, b, y):
        rest = [i for i in range(len(a)) if i!=y]
        p,q = soft(b[None,rest], T)[0],soft(a[None,rest], T)[0]
        return -soft(b[None])[0,y]*np.log(soft(a[None])[0,y]) - gamma*T**2*(p*np.log(q)).sum()
    return mean_of(one, s, t, y)

def by_hand_dist(s, t, tau=4.):
    p,q = soft(s, tau),soft(t, tau)
    return tau**2*((1-mean_of(corr, p, q)) + (1-mean_of(corr, p.T, q.T)))

def by_hand_mlkd(s, t, T=(2.,3.,4.,5.,6.)):
    res = 0
    for o in T:
        p,q = soft(s, o),soft(t, o)
        res += by_hand_kd(s, t, o) + ((p.T@p-q.T@q)**2).sum()/s.shape[1] + ((p@p.T-q@q.T)**2).sum()/len(s)
    return res

def by_hand_sigmoid(s, t, T=2.):
    p,q = (1/(1+np.exp(-o/T)) for o in (t,s))
    return T**2*(p*np.log(p/q) + (1-p)*np.log((1-p)/(1-q))).mean()

def by_hand_at(s, t):
    look = lambda x: unit((x**2).mean(1).reshape(len(x), -1))
    return ((look(s)-look(t))**2).mean()

def by_hand_sp(s, t):
    gram = lambda x: unit(np.array([[(a*b).sum() for b in x] for a in x]))
    return ((gram(s)-gram(t))**2).sum()/len(s)**2

def by_hand_pkt(s, t):
    def p(x):
        x = unit(pooled(x))
        k = np.array([[(a@b+1)/2 for b in x] for a in x])
        return k/k.sum(1, keepdims=True)
    return (p(t)*np.log((p(t)+1e-7)/(p(s)+1e-7))).mean()

def by_hand_cc(s, t, gamma=.4):
    k = lambda x: np.array([[np.exp(-gamma*((a-b)**2).sum()) for b in unit(pooled(x))] for a in unit(pooled(x))])
    return ((k(s)-k(t))**2).mean()

def huber(x): return np.where(np.abs(x)<1, x**2/2, np.abs(x)-.5).mean()

def by_hand_rkd(s, t):
    def distances(x):
        d = np.array([[np.linalg.norm(a-b) for b in x] for a in x])
        return d/d[d>0].mean()
    def angles(x): return np.array([[[unit(b-a)@unit(c-a) for c in x] for b in x] for a in x])
    s,t = pooled(s),pooled(t)
    return 25*huber(distances(s)-distances(t)) + 50*huber(angles(s)-angles(t))

def by_hand_nst(s, t):
    def mmd(a, b):
        a,b = (unit(o.reshape(len(o), -1)) for o in (a,b))
        k = lambda u,v: np.mean([(x@y)**2 for x in u for y in v])
        return k(a, a) + k(b, b) - 2*k(a, b)
    return mean_of(mmd, s, t)

def by_hand_ickd(s, t):
    def g(x):
        x = x.reshape(len(x), -1)
        return unit(np.array([[(a*b).sum() for b in x] for a in x]))
    return mean_of(lambda a,b: ((g(a)-g(b))**2).mean(), s, t)

def by_hand_pyramid(s, t):
    def pool(x, n):
        k = x.shape[2]//n
        return x.reshape(*x.shape[:2], n, k, n, k).mean((3,5))
    at = [((s-t)**2).mean()] + [((pool(s, n)-pool(t, n))**2).mean() for n in (4,2,1) if n<s.shape[2]]
    w = [.5**i for i in range(len(at))]
    return np.dot(w, at)/sum(w)

def by_hand_vid(s, t):
    var = np.array([.5,1.,2.])
    return np.mean([((s[:,c]-t[:,c])**2/v + np.log(v)).mean()/2 for c,v in enumerate(var)])

def by_hand_tfkd(s, t, y, a=.99, T=20.):
    def one(z, y):
        p = np.full(len(z), (1-a)/(len(z)-1))
        p[y] = a
        return T**2*kl(soft(np.log(p)[None], T)[0], soft(z[None], T)[0])
    return mean_of(one, s, y)

def by_hand_cskd(s, t, y, T=4.):
    "Each image from the next of its class"
    res = []
    for i in range(len(y)):
        later = [j%len(y) for j in range(i+1, i+len(y)) if y[j%len(y)]==y[i]]
        if later: res.append(T**2*kl(soft(t[later[0]][None], T)[0], soft(s[i][None], T)[0]))
    return np.mean(res)

def by_hand_ft(s, t): return mean_of(lambda a,b: np.abs(unit(a.ravel())-unit(b.ravel())).mean(), s, t)

def by_hand_ab(s, t, m=1.):
    on = np.where((s<=m)&(t>0), (s-m)**2, 0)
    off = np.where((s>-m)&(t<=0), (s+m)**2, 0)
    return (on+off).sum()/len(s)

margins = [-.5,-1.,-2.]

def by_hand_ofd(s, t):
    res = 0.
    for c,m in enumerate(margins):
        for a,b in zip(s[:,c].ravel(), t[:,c].ravel()):
            if b>0: res += (a-b)**2
            elif b>m: res += (a-b)**2*(a>b)
            else: res += (a-m)**2*(a>m)
    return res/len(s)

def by_hand_fsp(s, t):
    pool = lambda u: u.reshape(2, 2, 2, 2).mean((1,3))
    g = lambda a: np.array([[(pool(u)*v).mean() for v in a[:,::2,::2]] for u in a])
    return mean_of(lambda a,b: ((g(a)-g(b))**2).mean(), s, t)

def by_hand_kdsvd(s, t):
    def vectors(x, n):
        return np.linalg.svd(x.reshape(len(x), -1).T)[2][:n].T
    def pair(a, b):
        v,w = vectors(a, 4),vectors(b, 1)
        w = w*np.sign(w[np.abs(w).argmax()])
        cos = (v.T@w)[:,0]
        i = np.abs(cos).argmax()
        return v[:,i]*np.sign(cos[i]),w[:,0]
    rbf = lambda a,b: np.exp(-(a[:,None]-b[None])**2/8)
    def one(a, b):
        (v1,w1),(v2,w2) = pair(a, b),pair(a[:,::2,::2], b[:,::2,::2])
        return ((rbf(v1, v2)-rbf(w1, w2))**2).sum()
    return mean_of(one, s, t)

def by_hand_cosine(s, t): return mean_of(lambda a,b: 1-(a*b).sum(0)/np.sqrt((a**2).sum(0)*(b**2).sum(0)), s, t).mean()

def by_hand_wttm(s, t):
    p = np.exp(t)/np.exp(t).sum(1, keepdims=True)
    u = (p**.1).sum(1, keepdims=True)
    q,ps = p**.1/u,np.exp(s)/np.exp(s).sum(1, keepdims=True)
    return (u[:,0]*(q*np.log(q/ps)).sum(1)).mean()

def by_hand_ofa(s, t, y, eps):
    one = lambda a,b,y: -sum(((p+(c==y))**eps-(c==y))*np.log(q) for c,(p,q) in enumerate(zip(soft(b[None])[0], soft(a[None])[0])))
    return mean_of(one, s, t, y)

def by_hand_vkd(s, t):
    t = (t-t.mean(1, keepdims=True))/np.sqrt(t.var(1, keepdims=True)+1e-5)
    d = np.abs(s-t)
    return np.where(d<1, .5*d**2, d-.5).mean()

def log_similar(a, b):
    unit = lambda o: o/np.linalg.norm(o, axis=1, keepdims=True)
    logits = unit(a)@unit(b).T/.07
    return logits-np.log(np.exp(logits).sum(1, keepdims=True))

def kl_of_rows(s, t): return (np.exp(t)*(t-s)).sum(1).mean()

queue = np.random.RandomState(0).randn(7,5)
def by_hand_global(s, t): return kl_of_rows(log_similar(s, queue), log_similar(t, queue))

def by_hand_local(s, t):
    tokens = lambda o: o.reshape(len(o), -1).T
    return mean_of(lambda a,b: kl_of_rows(*(log_similar(tokens(o), tokens(o)) for o in (a,b))), s, t)

def later(loss): return lambda s,t: loss(s, s[:,:,::2,::2], t, t[:,:,::2,::2])

def from_labels(loss): return lambda s,t,y: loss(s, y=y)

y = torch.tensor([3,0,4,1,1])
of_logits = {'kd':(kd_loss,by_hand_kd), 'logits':(logits_loss,lambda s,t: ((s-t)**2).mean()), 'sigmoid':(partial(sigmoid_kd_loss, T=2.),by_hand_sigmoid), 'dkd':(partial(dkd_loss, y=y),lambda s,t: by_hand_dkd(s, t, y.numpy())),
    'nkd':(partial(nkd_loss, y=y, T=2.),lambda s,t: by_hand_nkd(s, t, y.numpy(), T=2.)), 'dist':(dist_loss,by_hand_dist), 'mlkd':(mlkd_loss,by_hand_mlkd),
    'tfkd':(partial(from_labels(tfkd_loss), y=y),lambda s,t: by_hand_tfkd(s, t, y.numpy())), 'cskd':(partial(lambda s,t,y: cskd_loss(s, y, target=t), y=y),lambda s,t: by_hand_cskd(s, t, y.numpy())),
    'ofa':(partial(ofa_loss, y=y),lambda s,t: by_hand_ofa(s, t, y.numpy(), 1.)), 'ofa 1.5':(partial(ofa_loss, y=y, eps=1.5),lambda s,t: by_hand_ofa(s, t, y.numpy(), 1.5)),
    'wttm':(wttm_loss,by_hand_wttm), 'vkd':(vkd_loss,by_hand_vkd), 'global':(lambda s,t: global_similarity_loss(s, t, torch.tensor(queue).to(at_least_float(s).dtype)),by_hand_global),
    'standardized':(lambda s,t: kd_loss(standardize(s), standardize(t)),lambda s,t: by_hand_kd(*((o-o.mean(1, keepdims=True))/o.std(1, ddof=1, keepdims=True) for o in (s,t))))}
of_maps = {'at':(at_loss,by_hand_at), 'hint':(hint_loss,lambda s,t: ((s-t)**2).mean()), 'sp':(sp_loss,by_hand_sp), 'pkt':(pkt_loss,by_hand_pkt), 'cc':(cc_loss,by_hand_cc), 'rkd':(rkd_loss,by_hand_rkd), 'nst':(nst_loss,by_hand_nst),
    'ft':(ft_loss,by_hand_ft), 'ab':(ab_loss,by_hand_ab), 'ofd':(partial(ofd_loss, margin=torch.tensor(margins)),by_hand_ofd), 'fsp':(later(fsp_loss),by_hand_fsp), 'kdsvd':(later(kdsvd_loss),by_hand_kdsvd),
    'cosine':(cosine_loss,by_hand_cosine), 'local':(local_similarity_loss,by_hand_local),
    'ickd':(ickd_loss,by_hand_ickd), 'pyramid':(pyramid_loss,by_hand_pyramid), 'vid':(lambda s,t: vid_loss(s, torch.tensor([.5,1.,2.]).to(s), t),by_hand_vid)}
losses = {**of_logits, **of_maps}

def inputs(name, dtype=torch.float64): return [o.to(dtype) for o in ((torch.randn(5,5), 3*torch.randn(5,5)) if name in of_logits else (torch.randn(5,3,4,4), torch.randn(5,3,4,4)))]

@pytest.mark.parametrize('name', losses)
def test_by_hand(name):
    loss,hand = losses[name]
    s,t = inputs(name)
    assert loss(s, t).dtype==torch.float64 and loss(s, t).item()==pytest.approx(hand(s.numpy(), t.numpy()), rel=1e-5)

@pytest.mark.parametrize('name', losses)
def test_gradients(name):
    s,t = inputs(name)
    assert gradcheck(lambda x: losses[name][0](x, t), s.requires_grad_())

@pytest.mark.parametrize('name', losses)
def test_no_less_than_float32(name):
    "Half precision and another order in memory give what the values give"
    loss,(s,t) = losses[name][0],inputs(name, torch.bfloat16)
    assert loss(s, t).dtype==torch.float32
    torch.testing.assert_close(loss(s, t), loss(s.float(), t.float()))
    if name in of_maps: torch.testing.assert_close(loss(*(o.float().contiguous(memory_format=torch.channels_last) for o in (s,t))), loss(s.float(), t.float()))

@pytest.mark.parametrize('name', losses)
def test_mixed_precision_rounds_nothing(name):
    "Autocast, in which terms are computed, casts what goes into products"
    s,t = (o.requires_grad_() for o in inputs(name, torch.float32))
    exact = losses[name][0](s, t)
    grad, = torch.autograd.grad(exact, s)
    with torch.autocast('cpu', torch.bfloat16): mixed = losses[name][0](s, t)
    assert torch.equal(mixed, exact) and torch.equal(torch.autograd.grad(mixed, s)[0], grad)

extremes = {'zeros':lambda x: torch.zeros_like(x), 'equal rows':lambda x: x[:1].expand_as(x).clone(), 'saturated':lambda x: 1e4*x.sign(), 'one image':lambda x: x[:1]}

@pytest.mark.parametrize('name', losses)
@pytest.mark.parametrize('extreme', extremes)
def test_nothing_is_nan(name, extreme):
    f = extremes[extreme]
    for a,b in ((f,f),(f,noop),(noop,f)):
        s,t = inputs(name, torch.float32)
        s,t = a(s),b(t)
        n = min(len(s), len(t))
        s,t = s[:n].requires_grad_(),t[:n]
        loss = losses[name][0]
        if isinstance(loss, partial) and 'y' in loss.keywords: loss = partial(loss, y=y[:n])
        v = loss(s, t)
        assert v.isfinite() and torch.autograd.grad(v, s)[0].isfinite().all()

zero = [n for n in losses if n not in ('nkd','vid','tfkd','cskd','ab','wttm','vkd','ofa','ofa 1.5')]

@pytest.mark.parametrize('name', zero)
def test_zero_where_they_agree(name):
    _,t = inputs(name)
    assert abs(losses[name][0](t.clone(), t).item())<1e-6

@pytest.mark.parametrize('name', ['dkd','nkd','ofa','dist','kd','sigmoid'])
def test_pixels_are_images(name):
    "`(bs,c,h,w)` as the images that the pixels would be"
    f = {'dkd':dkd_loss, 'nkd':nkd_loss, 'ofa':ofa_loss, 'dist':dist_loss, 'kd':kd_loss, 'sigmoid':sigmoid_kd_loss}[name]
    s,t,labels = torch.randn(2,5,3,4),torch.randn(2,5,3,4),torch.randint(5, (2,3,4))
    flat = lambda o: o.movedim(1, -1).reshape(-1, 5)
    args,rows = ((labels,),(labels.flatten(),)) if name in ('dkd','nkd','ofa') else ((),())
    torch.testing.assert_close(f(s, t, *args), f(flat(s), flat(t), *rows))
    if name!='sigmoid': torch.testing.assert_close(f(s.movedim(1, -1), t.movedim(1, -1), *args, axis=-1), f(s, t, *args))

@pytest.mark.parametrize('f', [dkd_loss,nkd_loss,partial(ofa_loss, eps=1.5)])
def test_pixels_without_a_label(f):
    s,t,labels = torch.randn(6,5),torch.randn(6,5),torch.tensor([0,1,-100,4,255,2])
    known = (labels>=0)&(labels<5)
    torch.testing.assert_close(f(s, t, labels), f(s[known], t[known], labels[known]))

# As callbacks

names = [n for n in methods() if n!='sigmoidkd']  # which is for other targets
apart = [n for n in names if n!='simkd']  # which puts another network in the student's place

class Keep(Callback):
    "The gradients of the first step, and what each term added"
    def before_step(self):
        self.grads = {n:p.grad.clone() for n,p in self.learn.student.named_parameters() if p.grad is not None}
        self.added = {t.label:t.value.item() for t in self.learn.teacher.terms}
        raise CancelFitException

def term(name):
    "A method without its ramp, at whose beginning it weighs nothing"
    res, = terms_of(name)
    if callable(res.weight): res.weight = res.weight(1.)
    return res

def asked(teacher, term): return teacher if term.taught else None

class Together:
    "A learner with several methods, of which some are switched on"
    def __init__(self, teacher, names):
        set_seed(0)
        self.asked = []
        teacher = deepcopy(teacher)
        teacher.stem.register_forward_hook(lambda m,i,o: self.asked.append(1) if len(o)>2 else None)
        self.teacher,self.terms = teacher,{n:term(n) for n in names}
        self.weights = {n:t.weight for n,t in self.terms.items()}
        for t in self.terms.values(): t.weight = 0.
        self.learn = distill_learner(few_digits(12, per_class=4, pad=0), teacher, wrn(10, 1), cbs=[*self.terms.values(), Keep()], precision='float32', opt_func=SGD, loss_func=CrossEntropyLossFlat())
        self.before = deepcopy(self.learn.model.state_dict())

    def step(self, *on):
        "Gradients by name, what was added by label, and teacher forwards of a step with the methods `on`"
        for n,t in self.terms.items(): t.weight = self.weights[n]*(n in on)
        self.learn.dls.train.rng.seed(0)
        self.learn.model.load_state_dict(self.before)  # some terms remember
        self.asked.clear()
        self.learn.model.zero_grad()
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, 1e-3)
        return self.learn.keep.grads,self.learn.keep.added,len(self.asked)

def far(a, b): return (sum((a[n]-b[n]).norm()**2 for n in b)**.5/sum(b[n].norm()**2 for n in b)**.5).item()

def minus(a, b): return {n:a[n]-b[n] for n in b}

@pytest.fixture(scope='module')
def alone(trained):
    both = Together(trained, apart)
    return both,both.step(),{n:both.step(n) for n in apart}

@pytest.mark.parametrize('name', apart)
def test_each_teaches_something(name, alone):
    both,(labels,_,none),single = alone
    grads,added,n = single[name]
    assert none==0 and n==both.terms[name].taught and added[both.terms[name].label]!=0 and sum(v!=0 for v in added.values())==1
    assert far(grads, labels)>1e-3 and all(g.isfinite().all() for g in grads.values())
    assert all(p.grad is None for p in both.teacher.parameters())

@pytest.mark.parametrize('name', slow_but(*apart[1::3], of=apart))
def test_it_combines_with_each_other(name, alone):
    "One teacher forward, and each adds what it adds alone"
    both,(labels,*_),single = alone
    for other in apart[apart.index(name)+1:]:
        grads,added,n = both.step(name, other)
        expected = {k:labels[k] + minus(single[name][0], labels)[k] + minus(single[other][0], labels)[k] for k in labels}
        assert n==any(both.terms[o].taught for o in (name,other)) and far(grads, expected)<1e-3, other
        for o in (name,other): assert added[both.terms[o].label]==pytest.approx(single[o][1][both.terms[o].label], rel=1e-4), other

@pytest.mark.parametrize('name', apart)
def test_the_exported_student_is_bare(name, trained, tmp_path, quiet):
    "Whatever was learned beside it is in the optimizer and not in the file, and the teacher is as it was"
    before = {k:v.clone() for k,v in trained.state_dict().items()}
    t = term(name)
    learn = distill_learner(few_digits(20, per_class=4), asked(trained, t), wrn(10, 1), cbs=t, path=tmp_path)
    made = [p for a in adapters_of(learn.model).values() for p in a.parameters()]
    quiet(learn, 1, 1e-3)
    in_optimizer = {id(p) for g in learn.opt.param_lists for p in g}
    assert all(id(p) in in_optimizer for p in made) and n_hooks(trained, learn.student)==0
    assert {*load_learner(learn.export_student()).model.state_dict()}=={*wrn(10, 1).state_dict()}
    assert all(torch.equal(v, before[k]) for k,v in trained.state_dict().items())

@pytest.mark.cuda
@pytest.mark.parametrize('name', names)
def test_a_step_waits_for_nothing(name, trained):
    "What fastai reads from the device in a step, and nothing else"
    t = term(name)
    arms = (None, None), (asked(trained, t), t)
    alone,ours = (waits_of(distill_learner(few_digits(pad=2), teacher, wrn(10, 1), cbs=cbs)) for teacher,cbs in arms)
    known = 12*(name=='kdsvd' and torch.cuda.is_available())  # torch.linalg.eigh checks its result, four times for each two taps
    assert ours<=alone+known, (ours,alone)

# The teacher's classifier

def test_simkd_leaves_the_labels_out(trained):
    alone,grads = Together(trained, ['simkd','kd','at']),{}
    for on in ([],['simkd'],['kd'],['at'],['simkd','at'],['simkd','kd']): grads['+'.join(on)],_,n = alone.step(*on)
    sim = grads['simkd']
    body = {k:v for k,v in sim.items() if k.startswith('body.')}
    assert 'classifier.weight' not in sim and far(body, {k:grads[''][k] for k in body})>.1
    expected = {k:sim[k]+grads['at'][k]-grads[''][k] for k in body}
    assert far({k:grads['simkd+at'][k] for k in body}, expected)<1e-3
    expected = {k:sim[k]+grads['kd'][k]-.1*grads[''][k] for k in body}  # no label is left beside KD either
    assert far({k:grads['simkd+kd'][k] for k in body}, expected)<1e-3

@pytest.mark.parametrize('make', [partial(models.resnet18, num_classes=10), partial(models.mobilenet_v2, num_classes=10), partial(wrn, 10, 1)], ids=['resnet18','mobilenet','wrn'])
def test_simkd_students(make, trained, tmp_path, quiet):
    learn = distill_learner(few_digits(20, per_class=4), trained, make(), cbs=SimKD(), path=tmp_path)
    before = trained.fc.weight.clone()
    quiet(learn, 1, 1e-3)
    back,x = load_learner(learn.export_student()).model.eval(),torch.randn(2,3,32,32)
    assert torch.equal(back(x), learn.student.eval()(x)) and torch.equal(back.classifier.weight, before)

def test_simkd_on_a_learner_that_has_been_fitted(trained, quiet):
    learn = quiet(distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1)), 1, 1e-3)
    learn.add_cb(SimKD())
    quiet(learn, 1, 3e-3, wd=.2)
    assert type(learn.student) is Reuse and all(p.grad is not None for p in learn.student.projector.parameters())
    assert {o['lr'] for o in learn.opt.hypers}=={3e-3} and {o['wd'] for o in learn.opt.hypers}=={.2}

def test_simkd_takes_the_classifier_of_a_new_teacher(trained):
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=SimKD())
    body,other = learn.student.body,wrn(10, 2)
    learn.remove_cb(TeacherCallback)
    learn.add_cb(TeacherCallback(other))
    learn.teacher.setup()
    assert torch.equal(learn.student.classifier.weight, other.fc.weight) and learn.student.body is body

# Labels

def test_a_mixture_has_the_mixture_of_values(trained, quiet):
    seen = []
    class Note(Callback):
        order,run_valid = 2,False
        def after_loss(self):
            t,mix = self.learn.dkd,self.learn.mix_up
            a,b = (dkd_loss(self.pred, self.learn.note.logits, o.as_subclass(Tensor), beta=2., reduction='none') for o in (self.y,mix.yb1[0]))
            seen.append((t.value.item(), (mix.lam*a+(1-mix.lam)*b).mean().item()))
    class Seen(DKD):
        "Hands the teacher's logits to `Note`"
        @property
        def column(self): return 'dkd'
        def term(self):
            self.learn.note.logits = self.source.out.clone()
            return super().term()
    term = Seen(beta=2., ramp=0)
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=[term, MixUp(), Note()], loss_func=CrossEntropyLossFlat())
    learn.dkd = term
    quiet(learn, 1, 1e-3)
    assert seen and all(a==pytest.approx(b, rel=1e-4) for a,b in seen)

def test_labels_that_a_function_cannot_mix(trained, quiet):
    def sure_loss(s, t, y): return dkd_loss(s, t, y)
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=[LogitKD(sure_loss), CutMix()], loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match="sure reads labels, which CutMix mixes"): quiet(learn, 1, 1e-3)
    learn.remove_cb(CutMix)
    quiet(learn, 1, 1e-3)
    assert learn.recorder.history.sure[0]>0

@pytest.mark.parametrize('name', ['dkd','nkd'])
def test_labels_that_are_none(name, trained):
    data = [(torch.randn(3,32,32), torch.rand(10)) for _ in range(8)]
    dls = DataLoaders(*(DataLoader(data, bs=4) for _ in range(2)))
    with pytest.raises(ValueError, match=f"{name.upper()} needs one class label per output"): distill_learner(dls, trained, wrn(10, 1), cbs=term(name), loss_func=nn.CrossEntropyLoss())

@pytest.mark.parametrize('name', [n for n in names if issubclass(methods()[n], LogitKD) and n not in ('mlkd','cskd','dml','ofa')])
def test_segmentation(name, quiet):
    "A decision for each pixel, by a small and a large network, with pixels that have no label"
    net = lambda c: nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 5, 1))
    data = [(torch.randn(3,8,8), torch.randint(5, (8,8)).where(torch.rand(8,8)<.9, 255)) for _ in range(24)]
    dls = DataLoaders(*(DataLoader(data, bs=8, shuffle=True) for _ in range(2)))
    t,teacher,student = term(name),net(16),net(4)
    x,y = (torch.stack(o) for o in zip(*data[:8]))
    flat = lambda o: o.movedim(1, -1).flatten(0, 2)
    with torch.no_grad(): s,z = flat(student(x)),flat(teacher.eval()(x))
    known = y.flatten()<5
    by_pixel = t.func(s[known], z[known], **(dict(y=y.flatten()[known]) if t.labelled else {}))
    outputs = CrossEntropyLossFlat(axis=1, ignore_index=255)
    learn = distill_learner(dls, asked(teacher, t), student, cbs=[t, Keep()], loss_func=outputs, precision='float32')
    learn.dls.train.shuffle = False
    quiet(learn, 1, 1e-2)
    assert learn.keep.added[name]==pytest.approx(t.weight*by_pixel.item(), rel=1e-4)
    for other in (MLKD(),CSKD()):
        with pytest.raises(ValueError, match='one prediction per image'): distill_learner(dls, asked(net(16), other), net(4), cbs=other, loss_func=outputs)

def test_exits(trained, quiet):
    "Each end of a stage has one, or each layer that is named; each learns what the teacher says"
    class Outs(Callback):
        order,run_valid = 2,False
        def after_loss(self):
            t = self.learn.ofa
            outs = [self.pred, *(t.adapters[a](self.learn.teacher.student_taps[a]) for a in t.layers)]
            s,told = [o.detach().double().numpy() for o in outs],self.learn.teacher.out.double().numpy()
            self.found = [*t.layers],t.value.item(),sum(by_hand_ofa(o, told, self.y.numpy(), 1.5) for o in s)
    learn = quiet(distill_learner(few_digits(), trained, resnet(10, width=.125, stem='small'), cbs=[OFA(eps=1.5), Outs()], precision='float32'), 1, 1e-3)
    layers,value,by_hand = learn.outs.found
    assert layers==['layer1','layer2','layer3','layer4'] and value==pytest.approx(by_hand, rel=1e-4)
    assert not any('exit' in n or 'ofa' in n for n in learn.student.state_dict())
    learn = distill_learner(few_digits(), trained, wrn(10, 1), cbs=[OFA(exits=['group2']), MixUp()])
    assert quiet(learn, 1, 1e-3).recorder.history.ofa[0]>0 and [*learn.ofa.adapters]==['group2']
    learn.show_pairs()
    assert 'group2' in str(learn.show_distill())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 10))
    with pytest.raises(ValueError, match='OFA finds no stages in this Sequential: pass exits'): distill_learner(few_digits(), trained, flat, cbs=OFA())

@pytest.mark.parametrize('make', [FitNet,VID,partial(FeatureKD, hint_loss, {'group3':'group3'})])
def test_standardized_features(make, trained, tmp_path, quiet):
    "Mean and scale of the first batch are taken out, are kept with the learner, and are measured again for another teacher"
    class Seen(Callback):
        order,run_valid = 2,False
        def before_fit(self): self.raw,self.given = [],[]
        def after_loss(self):
            b = [*self.learn.teacher.terms[0].layers.values()][-1]
            self.raw.append(self.learn.teacher.taps[b].clone()); self.given.append(self.learn.teacher.terms[0].target(b).clone())
    dls = few_digits()
    student = lambda net: distill_learner(dls, net, wrn(10, 2), cbs=[make(standardize=True), Seen()], precision='float32', path=tmp_path)
    learn = quiet(student(trained), 1, 1e-3)
    mean,std = learn.seen.raw[0].mean((0,2,3), keepdim=True),learn.seen.raw[0].var((0,2,3), correction=0).mean().sqrt()
    for raw,given in zip(learn.seen.raw, learn.seen.given): torch.testing.assert_close(given, (raw-mean)/std, rtol=1e-4, atol=1e-4)
    quiet(learn, 1, 1e-3)
    torch.testing.assert_close(learn.seen.given[0], (learn.seen.raw[0]-mean)/std, rtol=1e-4, atol=1e-4)
    kept = learn.model.adapters.state_dict()
    learn.save('kept')
    other = student(trained).load('kept')
    quiet(other, 1, 0.)
    assert all(torch.equal(v, kept[k]) for k,v in other.model.adapters.state_dict().items() if k.endswith('.std'))
    loud = deepcopy(trained)
    for n in loud.group3.modules():
        if isinstance(n, nn.Conv2d): n.weight.data.mul_(10)
    learn.remove_cb(TeacherCallback)
    learn.add_cb(TeacherCallback(loud, precision='float32'))
    quiet(learn, 1, 0.)
    assert learn.seen.given[0].var((0,2,3), correction=0).mean().item()==pytest.approx(1, rel=1e-3)
    assert learn.seen.raw[0].var((0,2,3), correction=0).mean().sqrt()>2*std

def test_standardized_features_after_lr_find(trained, tmp_path, quiet):
    "It restores weights from before the first batch, and with them that nothing was measured"
    learn = distill_learner(few_digits(), trained, wrn(10, 1), cbs=FitNet(standardize=True), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    scales = [m.std for n,m in learn.fitnet.adapters.items() if n.startswith('target_')]
    assert len(scales)==3 and not any(scales)
    assert 0<quiet(learn, 1, 1e-3).recorder.history.fitnet[0]<math.inf and all(scales)

def test_standardized_features_from_a_cache(trained, tmp_path, quiet):
    def values(*cbs):
        set_seed(0)
        dls = few_digits(pad=0)
        dls.train.rng.seed(0)
        return quiet(distill_learner(dls, trained, wrn(10, 1), cbs=[FitNet(standardize=True), *cbs], precision='float32'), 2, 0.).recorder.history.fitnet
    assert [*values(TeacherCache(tmp_path/'cache'))]==pytest.approx([*values()], rel=1e-2)

def test_the_axis_of_the_classes(quiet):
    "A language model has its classes last"
    data = [(torch.randint(7, (6,)), torch.randint(7, (6,))) for _ in range(16)]
    dls = DataLoaders(*(DataLoader(data, bs=8) for _ in range(2)))
    net = lambda n: nn.Sequential(nn.Embedding(7, n), nn.Linear(n, 7))
    teacher,student = net(16),net(4)
    learn = distill_learner(dls, teacher, student, cbs=[KD(alpha=.5), DKD(ramp=0.)], loss_func=CrossEntropyLossFlat(), opt_func=SGD, precision='float32')
    keep = Keep()
    learn.add_cb(keep)
    x,y = (torch.stack(o) for o in zip(*data[:8]))
    with torch.no_grad(): s,t = student(x).flatten(0, 1),teacher(x).flatten(0, 1)
    quiet(learn, 1, 0.)
    assert keep.added['kd']==pytest.approx(.5*kd_loss(s, t).item(), rel=1e-4) and keep.added['dkd']==pytest.approx(dkd_loss(s, t, y.flatten()).item(), rel=1e-4)

def test_tabular(quiet):
    "Two kinds of inputs, and labels (bs,1)"
    from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(a=np.random.choice([*'xyz'], 120), b=np.random.randn(120)))
    df['y'] = np.where(df.b+(df.a=='x')>0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], cont_names=['b'], y_names='y', y_block=CategoryBlock(), bs=16, valid_idx=[*range(20)])
    teacher,student = (tabular_learner(dls, layers=[n]).model for n in (50,8))
    learn = distill_learner(dls, teacher, student, cbs=[KD(alpha=.5), *(term(n) for n in ('logits','dkd','nkd','dist','mlkd'))])
    quiet(learn, 2, 1e-2)
    assert all(learn.recorder.history[n].iloc[-1]>0 for n in ('kd','logits','nkd','dist','mlkd'))

# Without labels

class OnlyImages(Callback):
    "Takes the labels away from training batches"
    order = -10
    def before_batch(self):
        if self.training: self.learn.yb = ()

def test_images_without_labels(trained, quiet):
    "The student learns from the teacher alone, and validation is as it was"
    def fit(*cbs, alpha):
        set_seed(0)
        dls = few_digits(pad=0)
        dls.train.rng.seed(0)
        learn = distill_learner(dls, trained, wrn(10, 1), cbs=[KD(alpha=alpha), AT(**AT_CIFAR), *cbs], opt_func=SGD, metrics=accuracy)
        learn.start = [p.detach().clone() for p in learn.student.parameters()]
        return quiet(learn, 2, 1e-3)
    loss_func = (one := fit(OnlyImages(), alpha=1.)).loss_func
    both = fit(alpha=1.)
    for a,b in zip(one.student.parameters(), both.student.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert isinstance(loss_func, CrossEntropyLossFlat) and one.recorder.history.valid_loss.tolist()==pytest.approx(both.recorder.history.valid_loss.tolist(), rel=1e-3)
    assert one.recorder.history.train_loss.eq(0).all() and not any(torch.equal(a, b) for a,b in zip(one.start, one.student.parameters()))

def test_a_folder_of_images_without_labels(trained, quiet, tmp_path):
    for i,x in enumerate(few_digits(1, per_class=2).train_ds): to_image(x[0]).save(tmp_path/f'{i}.png')
    dls = DataBlock(ImageBlock, get_items=get_image_files, splitter=RandomSplitter(.2, seed=0), batch_tfms=Normalize.from_stats(*digits_stats, cuda=False)).dataloaders(tmp_path, bs=4, num_workers=0, device='cpu')
    learn = distill_learner(dls, trained, wrn(10, 1), cbs=[KD(), SP()], loss_func=CrossEntropyLossFlat())
    before = [p.clone() for p in learn.student.parameters()]
    quiet(learn, 1, 1e-2)
    assert all(not torch.equal(a, b) for a,b in zip(before, learn.student.parameters())) and isinstance(learn.loss_func, CrossEntropyLossFlat)
    with pytest.raises(ValueError, match='DKD needs one class label per output'): distill_learner(dls, trained, wrn(10, 1), cbs=DKD(), loss_func=CrossEntropyLossFlat())

def test_an_interrupt_without_labels(trained, quiet):
    def stop(cb): raise KeyboardInterrupt
    learn = distill_learner(few_digits(), trained, wrn(10, 1), cbs=[OnlyImages(), Callback(after_backward=stop)])
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, 1e-3)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

# With what else there is

@pytest.mark.parametrize('name', slow_but(*apart[::3], of=apart))
def test_a_cache_gives_the_same(name, trained, tmp_path, monkeypatch, quiet):
    "In float32, so that nothing is left to rounding"
    half = TeacherCache._arrays
    monkeypatch.setattr(TeacherCache, '_arrays', lambda *a: {k:(shape, 'float32' if dtype=='float16' else dtype) for k,(shape,dtype) in half(*a).items()})
    def fit(*cbs):
        set_seed(0)
        dls = few_digits(16, per_class=4, pad=0)
        dls.train.rng.seed(0)
        t = term(name)
        learn = distill_learner(dls, asked(trained, t), wrn(10, 1), cbs=[t, *cbs], precision='float32', opt_func=SGD)
        return quiet(learn, 2, 1e-4)
    a,b = (fit(*o) for o in ((TeacherCache(tmp_path/'c'),), ()))
    assert a.recorder.history.values==pytest.approx(b.recorder.history.values, rel=1e-3)
    for p,q in zip(a.student.parameters(), b.student.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('name', ['vid','reviewkd','simkd','ickd','crd','ofd','factortransfer','dml'])
def test_what_is_learned_beside_is_saved(name, trained, tmp_path, quiet):
    make = lambda: distill_learner(few_digits(20, per_class=4), asked(trained, t := term(name)), wrn(10, 1), cbs=t, path=tmp_path)
    learn = quiet(make(), 1, 1e-3)
    learn.save('m')
    back = make().load('m')
    ours,theirs = ({**{f'a.{k}':v for k,v in nn.ModuleDict(adapters_of(o.model)).state_dict().items()}, **o.student.state_dict()} for o in (learn,back))
    assert {*ours}=={*theirs} and all(torch.equal(v, theirs[k]) for k,v in ours.items())

def test_review_by_hand(trained):
    "From the deepest level up, each fused with the one below by an attention over the two"
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=ReviewKD())
    review = learn.model.adapters['reviewkd_review'].eval()
    maps = [torch.randn(2, c, n, n) for c,n in ((16,32),(32,16),(64,8),(64,1))]
    with torch.no_grad():
        outs,below = review(maps),None
        for i in (3,2,1,0):
            level = review.levels[i]
            conv,norm = level.enter
            x = norm(F.conv2d(maps[i], conv.weight))
            assert x.shape[1]==64 and (level.attention is None)==(i==3)
            if below is not None:
                below = below.repeat_interleave(x.shape[2]//below.shape[2], 2).repeat_interleave(x.shape[3]//below.shape[3], 3)
                a = torch.sigmoid(F.conv2d(torch.cat([x,below], 1), level.attention[0].weight, level.attention[0].bias))
                x = a[:,:1]*x + a[:,1:]*below
            conv,norm = level.leave
            torch.testing.assert_close(outs[i], norm(F.conv2d(x, conv.weight, padding=1)))
            below = x
    assert [o.shape[1] for o in outs]==[32,64,128,128]

@pytest.mark.parametrize('name', ['rkd','pkt','cc','reviewkd','simkd'])
@pytest.mark.parametrize('arch', ['mobilenet_v2','shufflenet_v2_x0_5','efficientnet_b0','resnet18'])
def test_what_the_classifier_of_other_networks_reads(name, arch, trained):
    if (name,arch)==('reviewkd','shufflenet_v2_x0_5'): return  # it has no maps of the teacher's sizes
    student = getattr(torchvision.models, arch)(weights=None, num_classes=10)
    learn = distill_learner(few_digits(20, per_class=4), trained, student, cbs=[term(name), Keep()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.keep.added[name]!=0

def test_networks_of_which_that_cannot_be_told(trained):
    tvm = torchvision.models
    dls,dense = few_digits(20, per_class=4, size=32),tvm.DenseNet(growth_rate=4, block_config=(2,2), num_init_features=8, num_classes=10)
    for student,match in ((tvm.squeezenet1_1(weights=None, num_classes=10),'does not end in a linear layer'), (dense,'is not the mean of a feature map')):
        with pytest.raises(ValueError, match=match): distill_learner(dls, trained, student, cbs=SimKD())
        distill_learner(dls, trained, student, cbs=RKD())  # which takes the last feature maps
    with pytest.raises(ValueError, match='does not end in a linear layer'): distill_learner(dls, Ensemble(dls, trained, wrn(10, 1)), wrn(10, 1), cbs=SimKD())
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10))
    with pytest.raises(ValueError, match='has no convolutional stages'): distill_learner(dls, trained, mlp, cbs=SP())
    with pytest.raises(ValueError, match='the student lost its stages to tracing'): distill_learner(dls, trained, models.resnet18(weights=None, num_classes=10), cbs=[SimKD(), AT()])
    with pytest.raises(ValueError, match='distances, angles or both'): RKD(distance=0, angle=0)
    with pytest.raises(ValueError, match='vid cannot compare'): distill_learner(dls, trained, wrn(10, 1), cbs=VID({'fc':'fc'}))

def test_numbers_as_targets(quiet):
    data = [(torch.randn(4), torch.rand(())) for _ in range(16)]
    dls = DataLoaders(*(DataLoader(data, bs=8) for _ in range(2)))
    net = lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    learn = distill_learner(dls, net(), net(), cbs=Logits(), loss_func=F.mse_loss)
    quiet(learn, 1, 1e-2)
    assert learn.recorder.history.logits[0]>0
    for loss in (MSELossFlat(),nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match='not multi-label'): distill_learner(dls, net(), net(), cbs=SigmoidKD(), loss_func=loss)

def test_a_sweep_refuses_what_it_cannot_build_again():
    run = Run(method='simkd', teacher=Run(student='wrn-16-2'))
    assert run.remade and not run.teacher.remade
    with pytest.raises(ValueError, match='can neither teach nor be started from'): Run(method='kd', teacher=run)

# Which image it is

def by_hand_crd(v, w, memories, ids, y, classes, norms, tau=.07):
    "Both sums of noise contrastive estimation, image by image"
    n,res = len(classes),0.
    for i,j in enumerate(ids):
        others = [o for o in range(n) if o!=j and classes[o]!=y[i]]
        for emb,memory,z in ((v,memories[1],norms[0]),(w,memories[0],norms[1])):
            x = np.exp(memory@emb[i]/tau - z)
            noise = len(others)/n
            res -= np.log(x[j]/(x[j]+noise)) + sum(np.log(noise/(x[o]+noise)) for o in others)
    return res/len(ids)

def test_contrast_by_hand():
    torch.manual_seed(0)
    m = ContrastMemory(6, 9, 11, dim=4).double()
    m.classes.copy_(torch.arange(11)%3)
    s,t,ids,y = torch.randn(5,6).double(),torch.randn(5,9).double(),torch.tensor([7,2,10,0,5]),torch.tensor([7,2,10,0,5])%3
    for step in range(2):
        memories = [o.clone().numpy() for o in (m.of_student,m.of_teacher)]
        loss = m.contrast(s, t, ids, y)
        v,w = (o.detach().numpy() for o in m(s, t))
        assert loss.item()==pytest.approx(by_hand_crd(v, w, memories, ids.tolist(), y.tolist(), (np.arange(11)%3).tolist(), m.norms.numpy()), rel=1e-6)
        for memory,old,new in ((m.of_student,memories[0],v),(m.of_teacher,memories[1],w)):
            expected = old.copy()
            for i,j in enumerate(ids.tolist()): expected[j] = unit(.5*old[j]+.5*new[i])
            assert np.allclose(memory.numpy(), expected)
        if not step: assert m.norms[0].item()==pytest.approx(np.log(11*np.exp(v@memories[1].T/.07).mean()))

@pytest.mark.parametrize('workers', [0,2])
def test_the_memory_knows_its_images(workers, trained, quiet):
    "Shuffled, loaded by workers, the last batch left out: each row is of the image whose number it has"
    data = [(torch.randn(3,32,32), i%10) for i in range(50)]
    make = lambda shuffle: DataLoader(data, bs=8, shuffle=shuffle, drop_last=shuffle, num_workers=workers)
    learn = distill_learner(DataLoaders(make(True), make(False)), trained, wrn(10, 1), cbs=CRD(), loss_func=CrossEntropyLossFlat())
    quiet(learn, 2, 1e-3)
    classes = learn.model.adapters['crd_contrast'].classes
    known = classes>=0
    assert known.sum()>=48 and classes[known].tolist()==[i%10 for i in range(50) if known[i]]
    assert 'crd' in learn.recorder.history and not hasattr(learn.student, 'of_student')

def test_what_crd_refuses(trained, quiet):
    dls = few_digits(20, per_class=4)
    learn = distill_learner(dls, trained, wrn(10, 1), cbs=[CRD(), MixUp()], loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='CRD must tell images apart, but MixUp mixes them'): quiet(learn, 1, 1e-3)
    data = [(torch.randn(3,32,32), i%10) for i in range(16)]
    plain = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)))
    with pytest.raises(ValueError, match='which samples are in a batch'): distill_learner(plain, trained, wrn(10, 1), cbs=CRD(), loss_func=CrossEntropyLossFlat())
    for tau in (0,math.nan,math.inf):
        with pytest.raises(ValueError, match='positive temperature'): CRD(tau=tau)
    with pytest.raises(ValueError, match='got 2 pairs'): CRD({'pool':'pool', 'group3':'group3'})

# Without a teacher

def test_no_teacher_is_asked(trained, quiet):
    learn = quiet(distill_learner(few_digits(20, per_class=4), None, wrn(10, 1), cbs=[TfKD(alpha=.5), CSKD(), DML()]), 1, 1e-3)
    assert isinstance(learn.teacher.network, NoTeacher) and all((learn.recorder.history[k]>0).all() for k in ('tfkd','cskd','dml'))
    learn.add_cb(AT())
    with pytest.raises(ValueError, match='teacher is needed by AT'): learn.teacher.setup()
    with pytest.raises(ValueError, match='needs a teacher'): distill_learner(few_digits(20, per_class=4), None, wrn(10, 1), cbs=[TfKD(), KD()])
    blocks = learner_of(few_digits(20, per_class=4), trained, wrn(10, 1), 'tfkd+blocks')
    assert [t.column for t in blocks.teacher.terms]==['tfkd'] and blocks.teacher.network is trained
    with pytest.raises(ValueError, match='needs a teacher'): distill_learner(few_digits(20, per_class=4), None, wrn(10, 1), cbs=TfKD()).fit_blocks(1)

def test_the_control_stays_the_same(trained, quiet):
    "A term that weighs nothing changes nothing, peers included"
    def fit(*cbs, teacher=None):
        set_seed(0)
        dls = few_digits(20, per_class=4)
        dls.train.rng.seed(0)
        return quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[*cbs]), 1, 1e-3)
    a,b = fit(),fit(DML(peers=2, weight=0), CSKD(weight=0))
    assert all(torch.equal(p, q) for p,q in zip(a.student.parameters(), b.student.parameters()))

def test_peers_by_hand(quiet):
    "Two students of plain SGD, each in a loop of its own"
    set_seed(0)
    dls = few_digits(20, per_class=4, pad=0)
    nets = [wrn(10, 1),wrn(10, 2)]
    ours = [deepcopy(o) for o in nets]
    dls.train.rng.seed(0)
    learn = distill_learner(dls, None, ours[0], cbs=DML(peers=[ours[1]], weight=.5), opt_func=partial(SGD, mom=0.), wd=0., loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    dls.train.rng.seed(0)
    for x,y in dls.train:
        outs = [o.train()(x) for o in nets]
        for i,o in enumerate(nets):
            loss = F.cross_entropy(outs[i], y.as_subclass(Tensor).long()) + .5*kd_loss(outs[i], outs[1-i].detach(), T=1.)
            grads = torch.autograd.grad(loss, [*o.parameters()], retain_graph=True)
            with torch.no_grad():
                for p,g in zip(o.parameters(), grads): p -= .01*g
    for a,b in zip(nets, ours):
        for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

def test_what_peers_must_be(quiet):
    dls = few_digits(20, per_class=4)
    with pytest.raises(ValueError, match='at least one peer'): distill_learner(dls, None, wrn(10, 1), cbs=DML(peers=0))
    with pytest.raises(ValueError, match='at least one peer'): distill_learner(dls, None, wrn(10, 1), cbs=DML(peers=[wrn]))
    with pytest.raises(ValueError, match='Student and peer must have the same outputs'): distill_learner(dls, None, wrn(10, 1), cbs=DML(peers=[wrn(10, 1, n_out=7)]))
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3*16*16, 10))
        def forward(self, x): return x.flatten(1)@self.w
    with pytest.raises(ValueError, match='pass the other students'): distill_learner(dls, None, Own(), cbs=DML())

def test_images_alone_with_their_class(quiet):
    data = [(torch.randn(3,32,32), i) for i in range(10)]
    dls = DataLoaders(*(DataLoader(data, bs=5) for _ in range(2)))
    learn = distill_learner(dls, None, wrn(10, 1), cbs=CSKD(), loss_func=CrossEntropyLossFlat())
    with pytest.warns(UserWarning, match='100% of the images have no other image of their class'): quiet(learn, 1, 1e-3)
    assert learn.recorder.history.cskd[0]==0

# Before the ReLU, and two stages

@pytest.mark.slow
@pytest.mark.parametrize('name', ['ab','ofd'])
@pytest.mark.parametrize('student,teacher', [('resnet18','resnet34'),('resnet18','resnet50'),('resnet18','vgg11_bn')])
def test_other_networks_before_the_relu(name, student, teacher):
    nets = [getattr(torchvision.models, o)(weights=None, num_classes=10) for o in (student,teacher)]
    learn = distill_learner(few_digits(8, per_class=1, size=32, valid=8), nets[1], nets[0], cbs=[term(name), Keep()], precision='float32')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.keep.added[name]>0

def test_before_the_relu_there_is_something_below_zero(trained):
    net = resnet(10, stem='small')
    learn = distill_learner(few_digits(20, per_class=4), resnet(14, stem='small'), net, cbs=OFD())
    assert [*learn.ofd.layers]==[f'layer{i}.0.act:in' for i in (1,2,3,4)] and learn.ofd.layers['layer4.0.act:in']=='layer4.1.act:in'
    x = torch.randn(2,3,32,32)
    frozen = Frozen(net.eval(), (x,), ['layer1.0.act:in','layer1'], precision='float32')
    _,maps = frozen(x)
    torch.testing.assert_close(maps['layer1.0.act:in'].relu(), maps['layer1'])
    assert (maps['layer1.0.act:in']<0).any()

def test_two_stages_by_hand(trained, quiet):
    "The first stage is a fit on the term alone, the second one on labels and soft labels"
    def make(*terms):
        set_seed(0)
        dls = few_digits(20, per_class=4, pad=0)
        dls.train.rng.seed(0)
        return distill_learner(dls, trained, wrn(10, 1), cbs=[*terms], opt_func=SGD, loss_func=CrossEntropyLossFlat())
    class Alone(Callback):
        order = 10
        def after_loss(self): self.learn.loss_grad = self.learn.loss_grad - self.learn.loss
    a,b = make(FitNet(), KD()),make(FitNet(weight=100.))
    said = []
    with a.no_bar(), contextmanager(replacing_yield)(a, 'logger', said.append): a.fit_two_stages(2, 3, 1e-4, wd=0.)
    assert [o for o in said if isinstance(o, str)]==['first: 2 epochs on fitnet','second: 3 epochs on labels']
    b.add_cb(Alone())
    with b.no_bar(), b.no_logging(): b.fit_one_cycle(2, 1e-4, wd=0.)
    b.remove_cb(Alone)
    b.remove_cb(FitNet)
    b.add_cb(KD())
    with b.no_bar(), b.no_logging(): b.fit_one_cycle(3, 1e-4, wd=0., reset_opt=True)
    for p,q in zip(a.student.parameters(), b.student.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

def test_the_paraphraser_learns_first(trained):
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=FactorTransfer())
    factors,kept = learn.model.adapters['factortransfer_group3'],{}
    class Note(Callback):
        def before_fit(self): kept[self.learn.factortransfer.stage] = {k:v.clone() for k,v in (*factors.state_dict().items(), *self.learn.student.state_dict().items())}
    with learn.no_bar(), learn.no_logging(): learn.fit_two_stages(1, 1, 1e-2, cbs=Note())
    end = {**factors.state_dict(), **learn.student.state_dict()}
    changed = lambda a,b,part: [not torch.equal(a[k], b[k]) for k in a if k.startswith(part) and 'num_batches' not in k]
    first = kept[1],kept[2]
    assert all(changed(*first, 'paraphraser')) and all(changed(*first, 'back')) and not any(changed(*first, 'translator'))
    assert not any(changed(*first, 'group1.0.conv')) and not any(changed(*first, 'fc'))
    second = kept[2],end
    assert not any(changed(*second, 'paraphraser')) and not any(changed(*second, 'back')) and all(changed(*second, 'translator')) and all(changed(*second, 'fc'))

# Other learners

@pytest.mark.parametrize('names', slow_but('kd+at', of=('kd+at','fitnet+dkd','vid+ickd+nst','ab','fsp+sp')))
def test_unets(names, quiet):
    "A U-Net with a small body from one with a larger body"
    data = [(torch.randn(3,32,32), torch.randint(4, (32,32))) for _ in range(8)]
    dls = DataLoaders(*(DataLoader(data, bs=4) for _ in range(2)))
    teacher,student = (unet_learner(dls, arch, n_out=4, pretrained=False, normalize=False, loss_func=noop).model for arch in (models.resnet34,models.resnet18))
    terms = terms_of(names)
    learn = distill_learner(dls, teacher, student, cbs=terms, loss_func=CrossEntropyLossFlat(axis=1))
    quiet(learn, 1, 1e-3)
    assert all(learn.recorder.history[t.label][0]>0 for t in terms)
    if names=='ab':
        with pytest.raises(ValueError, match='OFD takes its margins from a norm'): distill_learner(dls, teacher, student, cbs=OFD(), loss_func=CrossEntropyLossFlat(axis=1))

def test_language_models(quiet):
    "Recurrent networks, whose outputs are tuples, with a state that goes on from batch to batch"
    from fastai.text.all import AWD_LSTM, LMDataLoader, get_language_model, LMLearner
    torch.manual_seed(0)
    tokens = [torch.randint(20, (200,)) for _ in range(4)]
    dls = DataLoaders(*(LMDataLoader(tokens, bs=4, seq_len=10) for _ in range(2)))
    config = lambda n: dict(emb_sz=n, n_hid=2*n, n_layers=2, pad_token=1, bidir=False, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=.1, tie_weights=True, out_bias=True)
    teacher,by_hand,forgetful,student = (get_language_model(AWD_LSTM, 20, config(n)).eval() for n in (12,12,12,6))
    for p in teacher.parameters(): p.data *= 4  # so that it has something to say, and to remember
    for o in (by_hand,forgetful): o.load_state_dict(teacher.state_dict())
    found = []
    learn = distill_learner(dls, teacher, student, cbs=[KD(alpha=1.), ModelResetter(), RNNCallback()], loss_func=CrossEntropyLossFlat(), precision='float32')
    class Note(Callback):
        "The teacher remembers what came before in this epoch, and nothing of the last one"
        run_valid,order = False,2
        def before_train(self): by_hand.reset()
        def after_loss(self):
            with torch.no_grad(): t = by_hand(self.x)[0]
            forgetful.reset()
            with torch.no_grad(): f = forgetful(self.x)[0]
            found.append((self.learn.kd.value.item(), *(kd_loss(self.pred.flatten(0, 1), o.flatten(0, 1)).item() for o in (t,f))))
    learn.add_cb(Note())
    quiet(learn, 2, 1e-3)
    assert len(found)>4 and all(a==pytest.approx(b, rel=1e-3) for a,b,_ in found) and any(a!=pytest.approx(c, rel=1e-2) for a,_,c in found)

def test_logits_before_other_things(trained, quiet):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained
        def forward(self, x):
            out = self.net(x)
            return out,-out
    def fit(teacher):
        set_seed(0)
        dls = few_digits(20, per_class=4)
        dls.train.rng.seed(0)
        return quiet(distill_learner(dls, teacher, wrn(10, 1), opt_func=SGD, precision='float32'), 1, 1e-3)
    for a,b in zip(fit(trained).student.parameters(), fit(Two()).student.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

# What else goes wrong

def test_data_that_are_exchanged(trained, quiet):
    "The memory is as long as the training set, and forgets another one"
    few,more = few_digits(20, per_class=4),few_digits(20, per_class=6)
    learn = quiet(distill_learner(few, trained, wrn(10, 1), cbs=CRD()), 1, 1e-3)
    learn.dls = more
    quiet(learn, 1, 1e-3)
    memory = learn.model.adapters['crd_contrast']
    assert len(memory.classes)==len(more.train_ds)==60 and (memory.classes>=0).all()
    learn.dls = few_digits(20, per_class=6, seed=7)
    forgot = []
    class Note(Callback):
        def before_batch(self): forgot.append((memory.classes<0).all().item())
    quiet(learn, 1, 0., cbs=Note())
    assert forgot[0] and not forgot[-1]

@pytest.mark.parametrize('shape,kind', [((),int), ((1,),int), ((),'unknown')])
def test_labels_of_any_shape(shape, kind, trained, quiet):
    data = [(torch.randn(3,32,32), torch.full(shape, -1 if kind=='unknown' and i%2 else i%5)) for i in range(20)]
    dls = DataLoaders(*(DataLoader(data, bs=10, shuffle=True) for _ in range(2)))
    loss = CrossEntropyLossFlat(ignore_index=-1)
    learn = quiet(distill_learner(dls, trained, wrn(10, 1), cbs=[CRD(),CSKD(),TfKD(alpha=.5)], loss_func=lambda p,y,**kw: loss(p, y.flatten())), 1, 1e-3)
    classes = learn.model.adapters['crd_contrast'].classes
    assert classes.tolist()==[-1 if kind=='unknown' and i%2 else i%5 for i in range(20)] and learn.recorder.history.crd[0]>1 and learn.recorder.history.cskd[0]>0

def test_peers_are_those_that_were_given(trained, quiet):
    dls = few_digits(20, per_class=4)
    learn = quiet(distill_learner(dls, None, wrn(10, 1), cbs=DML()), 1, 1e-3)
    learn.remove_cb(DML)
    learn.add_cb(DML(peers=(peer := wrn(10, 1))))
    quiet(learn, 1, 1e-3)
    assert learn.dml.peers==[peer]
    both = distill_learner(dls, None, wrn(10, 1), cbs=[DML(), DML(peers=2, T=2)])
    assert [len(t.peers) for t in both.teacher.terms]==[1,2]
    student = wrn(10, 1)
    for peers in ([student],[peer,peer]):
        with pytest.raises(ValueError, match='share parameters'): distill_learner(dls, None, student, cbs=DML(peers=peers))
    with pytest.raises(RuntimeError, match='to have 1 channels, but got 3'): distill_learner(dls, None, wrn(10, 1), cbs=DML(peers=[wrn(10, 1, n_in=1)]))
    with pytest.raises(ValueError, match='frozen classifier: remove one'): distill_learner(dls, trained, wrn(10, 1), cbs=[SimKD(),DML()])

def test_a_twin_is_no_copy():
    "Not even of a student that was made from the same seed a moment ago"
    set_seed(0)
    student = wrn(10, 1)
    set_seed(0)
    learn = distill_learner(few_digits(20, per_class=4), None, student, cbs=DML())
    assert not any(torch.equal(p, q) for p,q in zip(student.parameters(), learn.dml.peers[0].parameters()) if p.ndim>1)

def test_an_export_without_teacher_goes_on(tmp_path, quiet):
    dls = few_digits(20, per_class=4)
    learn = quiet(distill_learner(dls, None, wrn(10, 1), cbs=[TfKD(alpha=.5), DML()], path=tmp_path), 1, 1e-3)
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size<1.5*learn.export_student().stat().st_size  # no peer is in it
    back = load_learner(tmp_path/'l.pkl')
    back.dls = dls
    quiet(back, 1, 1e-3)
    assert (back.recorder.history[['tfkd','dml']]>0).all().all()

def test_terms_that_leave_the_teacher_out(trained):
    with pytest.raises(ValueError, match='pass None as teacher, or add'): distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=CSKD())

def test_two_stages_after_a_fit_and_with_a_ramp(trained, quiet):
    "No weight decay on what nobody teaches, whatever was trained before, and no crash where nothing weighs"
    dls = few_digits(20, per_class=4)
    ab = AB(weight=phased(3e-3, ramp=.5))
    learn = quiet(distill_learner(dls, trained, wrn(10, 1), cbs=[ab,KD()], opt_func=SGD), 1, 1e-3)
    kept,seen = [],[]
    class Note(Callback):
        def before_fit(self): kept.append(self.learn.student.fc.weight.clone())
    watch = SaveModelCallback(monitor='valid_loss')
    class Seen(Callback):
        def before_epoch(self): seen.append((self.learn.ab.stage, watch in self.learn.cbs))
    with tempfile.TemporaryDirectory() as tmp, learn.no_bar(), learn.no_logging():
        learn.path = Path(tmp)
        learn.fit_two_stages(2, 1, 1e-2, wd=.5, cbs=[Note(),Seen(),watch])
    assert torch.equal(*kept) and not torch.equal(kept[1], learn.student.fc.weight)
    assert seen==[(1,False),(1,False),(2,True)]
    with pytest.raises(ValueError, match="has the column 'nonsense'"): learn.fit_two_stages(1, 1, cbs=SaveModelCallback(monitor='nonsense'))

def test_margins_follow_the_teacher(quiet):
    teacher = wrn(10, 2)
    learn = quiet(distill_learner(few_digits(20, per_class=4), teacher, wrn(10, 1), cbs=OFD()), 1, 1e-3)
    before = learn.ofd.margins['bn'].clone()
    teacher.bn.bias.data += 1
    quiet(learn, 1, 1e-3)
    assert not torch.equal(learn.ofd.margins['bn'], before)

def test_one_relu_for_all_stages():
    act = nn.ReLU()
    stage = lambda a,b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), act)
    net = nn.Sequential(OrderedDict(a=stage(3, 8), b=stage(8, 16), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, 10)))
    x = torch.randn(2,3,32,32)
    assert before_relu(net, x, 'a')==('a.1','a.1')
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.act = act
        def forward(self, x): return self.act(self.conv(x)+x)
    with pytest.raises(ValueError, match='give each stage its own ReLU'): before_relu(nn.Sequential(OrderedDict(a=Sum(), b=Sum())), x, 'a')

# Layers that a network calls several times, or without a graph

class Siamese(nn.Module):
    "Two images, one encoder, called for each of them"
    def __init__(self, n):
        super().__init__()
        self.enc,self.fc = wrn(10, n),nn.Linear(20, 10)
    def forward(self, a, b): return self.fc(torch.cat([self.enc(a), self.enc(b)], 1))

class SiameseAtOnce(Siamese):
    "The same, called once for both"
    def forward(self, a, b): return self.fc(torch.cat(self.enc(torch.cat([a, b])).chunk(2), 1))

class Shared(nn.Module):
    "Blocks that share their weights; with one call, none are shared"
    def __init__(self, n, times):
        super().__init__()
        self.stem,self.block,self.down,self.fc = nn.Conv2d(3, n, 3, 2, 1),nn.Conv2d(n, n, 3, 1, 1),nn.Conv2d(n, n, 3, 2, 1),nn.Linear(n, 10)
        self.times = times
    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.times): x = self.block(x).relu()
        return self.fc(self.down(x).mean((2,3)))

def image_pairs(n=16):
    data = [(torch.randn(3,32,32), torch.randn(3,32,32), i%10) for i in range(n)]
    return DataLoaders(*(DataLoader(data, bs=8, n_inp=2) for _ in range(2)))

again = {'siamese at':(image_pairs, Siamese, Siamese, AT), 'siamese fitnet':(image_pairs, Siamese, Siamese, FitNet),
    'siamese teacher':(image_pairs, Siamese, SiameseAtOnce, AT), 'siamese student':(image_pairs, SiameseAtOnce, Siamese, AT),
    'before the relu':(image_pairs, Siamese, Siamese, AB), 'named':(image_pairs, Siamese, Siamese, partial(RKD, {'enc.pool':'enc.pool'})),
    **{f'shared {s} {t}':(None, partial(Shared, times=t), partial(Shared, times=s), partial(term, {'block':'block'}))
        for s,t,term in ((2,1,AT), (1,2,VID), (3,3,SP), (2,2,FSP))},
    'a relu':(None, *[lambda n: models.resnet18(num_classes=10)]*2, partial(AT, {'layer1.0.relu:in':'layer1.0.relu:in'}))}
again['shared 2 2'] = *again['shared 2 2'][:3],partial(FSP, {'block':'block','down':'down'})

@pytest.mark.parametrize('cached', [False,True], ids=['asked','cached'])
@pytest.mark.parametrize('name', again)
def test_a_layer_called_again_is_refused(name, cached, tmp_path):
    "The last call alone would teach, whichever of the networks it is that calls it again"
    data,teacher,student,term = again[name]
    cbs = [term(), *([TeacherCache(tmp_path/'c')] if cached else [])]
    with pytest.raises(ValueError, match="The layer '.*' is called more than once in a forward pass: tap one that is called once, or"):
        distill_learner((data or partial(few_digits, 20, per_class=2))(), teacher(4), student(4), cbs=cbs, loss_func=CrossEntropyLossFlat())

@pytest.mark.parametrize('term', [AT,FitNet,SP,OFD])
def test_a_siamese_network_that_is_called_once_learns_at_both(term, quiet):
    "The remedy: the label loss left out, both images have a gradient"
    teacher,student,grads = SiameseAtOnce(2),SiameseAtOnce(1),[]
    class Look(Callback):
        order = CastToTensor.order+1
        def before_batch(self): self.learn.xb = tuple(o.requires_grad_() for o in self.xb)
        def before_step(self): grads.append([o.grad.abs().sum().item() for o in self.xb])
    learn = distill_learner(image_pairs(), teacher, student, cbs=[term(), Look()], loss_func=lambda p,y: 0*p.sum())
    quiet(learn, 1, 1e-3)
    assert all(o>0 for g in grads for o in g)

def test_a_relu_that_a_block_calls_twice_counts_once():
    "Before the ReLU at the end of a torchvision block, the last call is meant, in the teacher's copy as well"
    net,x = models.resnet18(weights=None, num_classes=10),torch.zeros(2,3,64,64)
    name,_ = before_relu(net, x, 'layer1')
    assert name=='layer1.1.relu:in'
    Frozen(net.eval(), (x,), [name])
    with pytest.raises(ValueError, match='more than once'): Frozen(net, (x,), ['layer1.1.relu'])

class Checkpointed(nn.Module):
    "A WRN whose body is computed again in the backward"
    def __init__(self, net, reentrant, learns=True):
        super().__init__()
        self.net,self.reentrant,self.learns = net,reentrant,learns
        if not learns: self._body.requires_grad_(False)
    @property
    def _body(self): return nn.Sequential(self.net.stem, self.net.group1, self.net.group2)
    def body(self, x):
        for m in (self.net.group1,self.net.group2): x = m(x)
        return x
    def forward(self, x):
        x = self.net.stem(x)
        if self.reentrant is None: x = self.body(x)
        else: x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)
        for m in list(self.net.children())[3:]: x = m(x)
        return x

def gradient_of(make, teacher, term, quiet):
    set_seed(0)
    learn,seen = distill_learner(few_digits(20, per_class=2), teacher, make(wrn(10, 1)), cbs=term, loss_func=lambda p,y: 0*p.sum()),[]
    class Look(Callback):
        def before_step(self): seen.append(self.learn.student.net.group1[0].conv1.weight.grad.clone())
    quiet(learn, 1, 0., cbs=Look())
    return seen[0]

@pytest.mark.parametrize('term,layer', [(FitNet,'net.group2'), (AT,'net.group1'), (SP,'net.group2'), (OFD,'net.group1'), (VID,'net.group1.0.conv1'), (CRD,'net.group2')],
    ids=lambda o: getattr(o, '__name__', o))
def test_gradient_checkpointing(term, layer, trained, quiet):
    "The gradient of the term is that without checkpoints, or there is an error that says how to come by it"
    pairs = {layer:layer.removeprefix('net.')}
    plain,right = (gradient_of(partial(Checkpointed, reentrant=o), trained, term(pairs), quiet) for o in (None,False))
    assert plain.abs().sum()>0 and torch.allclose(plain, right, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="The student runs 'net.group.* without a graph.*: pass use_reentrant=False to gradient checkpointing"):
        gradient_of(partial(Checkpointed, reentrant=True), trained, term(pairs), quiet)

@pytest.mark.parametrize('reentrant', [None,False])
def test_a_frozen_body_is_no_missing_graph(reentrant, trained, quiet):
    "It may be unfrozen later; its adapter learns meanwhile"
    learn = distill_learner(few_digits(20, per_class=2), trained, Checkpointed(wrn(10, 1), reentrant, learns=False), cbs=[FitNet({'net.group2':'group2'}), KD()])
    start = learn.model.adapters['fitnet_net_group2'][0].weight.detach().clone()
    quiet(learn, 1, 1e-2)
    assert not torch.equal(start, learn.model.adapters['fitnet_net_group2'][0].weight)

class NoGrad(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        with torch.no_grad(): x = self.net.group2(self.net.group1(self.net.stem(x)))
        for m in list(self.net.children())[3:]: x = m(x)
        return x

def test_a_tap_under_no_grad(trained, quiet):
    learn = distill_learner(few_digits(20, per_class=2), trained, NoGrad(wrn(10, 1)), cbs=FitNet({'net.group2':'group2'}))
    with pytest.raises(ValueError, match="'net.group2' without a graph.*no_grad"): quiet(learn, 1, 1e-3)
    assert n_hooks(learn.student)==0
    quiet(distill_learner(few_digits(20, per_class=2), trained, NoGrad(wrn(10, 1)), cbs=FitNet({'net.group3':'group3'})), 1, 1e-3)

# Networks that were traced

def traced_stages(net):
    class Stages(torch.fx.Tracer):
        def is_leaf_module(self, m, n): return n.startswith(('group','layer')) or super().is_leaf_module(m, n)
    return torch.fx.GraphModule(net, Stages().trace(net))

def zeros(make):
    "A network whose values do not matter: a VGG takes a second to initialize"
    with torch.device('meta'): net = make()
    net = net.to_empty(device='cpu')
    for o in net.state_dict().values(): o.zero_()
    return net

@pytest.mark.parametrize('side', slow_but('both', of=['student','teacher','both']))
@pytest.mark.parametrize('trace', [torch.fx.symbolic_trace, traced_stages, lambda net: nn.Sequential(torch.fx.symbolic_trace(net))], ids=['traced','stages kept','inside'])
@pytest.mark.parametrize('make', [partial(wrn, 16, 1), models.resnet18, models.vgg11_bn, models.mobilenet_v2, models.alexnet, models.efficientnet_b0, partial(resnet, 10)],
    ids='wrn resnet18 vgg mobilenet alexnet efficientnet ours'.split())
def test_traced_networks_have_the_pairs_of_untraced_ones_or_none(make, trace, side):
    s,x = zeros(make),torch.zeros(2,3,64,64)
    t,traced = deepcopy(s),trace(s)
    right = pair_layers(s, t, x)
    called = {n for n,*_ in calls_of(traced, x)}
    s,t,start = traced if side!='teacher' else s,trace(t) if side!='student' else t,'0.' if isinstance(traced, nn.Sequential) else ''
    right = {(start if side!='teacher' else '')+a:(start if side!='student' else '')+b for a,b in right.items()}
    if {a for p in right.items() for a,traced in zip(p, (side!='teacher',side!='student')) if traced} <= called: assert pair_layers(s, t, x)==right
    else:
        with pytest.raises(ValueError, match=f"{'teacher' if side=='teacher' else 'student'} lost its stages to tracing"): pair_layers(s, t, x)

# Samples that a loader leaves out

def skipping_dls(how, workers=0, bad=3, n=10):
    data = [(torch.randn(3,32,32), i%10, i) for i in range(n)]
    def after_item(o):
        if o[2]==bad and how=='item': raise SkipItemException
        return o[:2] if how!='batch' else o
    def before_batch(b): return [o[:2] for o in b if o[2]!=bad]
    class Data(list):
        def __getitem__(self, i):
            if i==bad and how=='dataset': raise SkipItemException
            return super().__getitem__(i)
    kwargs = dict(bs=4, num_workers=workers, after_item=after_item, **(dict(before_batch=before_batch) if how=='batch' else {}))
    return DataLoaders(DataLoader(Data(data), **kwargs), DataLoader(data, bs=4, after_item=lambda o: o[:2]))

@pytest.mark.parametrize('workers', slow_but(0, of=[0,2]))
@pytest.mark.parametrize('how', ['item','dataset','batch'])
@pytest.mark.parametrize('cbs', [lambda path: [CRD()], lambda path: [KD(), TeacherCache(path)], lambda path: [CRD(), TeacherCache(path)]], ids=['crd','cache','both'])
def test_a_loader_that_skips_a_sample(cbs, how, workers, trained, tmp_path, quiet):
    "All after it would have the number of another"
    learn = distill_learner(skipping_dls(how, workers), trained, wrn(10, 1), cbs=cbs(tmp_path/'c'), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='does not show which samples are in a batch: leave|skips none'): quiet(learn, 1, 1e-3)
    assert 'do_item' not in vars(learn.dls.train)
    learn = distill_learner(skipping_dls(how, workers), trained, wrn(10, 1), cbs=KD(), loss_func=CrossEntropyLossFlat())
    quiet(learn, 1, 1e-3)

@pytest.mark.parametrize('workers', [0,2])
def test_numbers_of_samples(workers, trained, quiet):
    seen = []
    class Look(CRD):
        def term(self):
            seen.extend(zip(self.source.ids, self.y.tolist()))
            return super().term()
    learn = distill_learner(skipping_dls('none', workers), trained, wrn(10, 1), cbs=Look(), loss_func=CrossEntropyLossFlat())
    quiet(learn, 2, 1e-3)
    assert seen==[(i,i%10) for i in range(10)]*2 and 'do_item' not in vars(learn.dls.train)

# What the loss leaves out, and what is not finite

@pytest.mark.parametrize('number', [0,255])
@pytest.mark.parametrize('make', [lambda: KD(alpha=.5), lambda: DKD(ramp=0.), NKD, DIST, Logits, lambda: TfKD(alpha=.5)], ids=['kd','dkd','nkd','dist','logits','tfkd'])
def test_an_ignored_label_of_any_number(make, number, quiet):
    "A teacher changed at ignored pixels alone changes nothing, and the value is that of the pixels that count"
    set_seed(0)
    y = torch.randint(1, 5, (8,8,8)).where(torch.rand(8,8,8)<.7, number)
    student,teacher = torch.randn(8,5,8,8),3*torch.randn(8,5,8,8)
    class Fixed(nn.Module):
        def __init__(self, x):
            super().__init__()
            self.x = nn.Parameter(x)
        def forward(self, x): return self.x[:len(x)]
    def added(t, teacher, loss):
        set_seed(1)
        dls = DataLoaders(*(DataLoader([*zip(torch.randn(8,3,8,8), y)], bs=8) for _ in range(2)))
        learn = distill_learner(dls, asked(Fixed(teacher), t), Fixed(student.clone()), cbs=[t, Keep()], loss_func=loss, precision='float32')
        return quiet(learn, 1, 0.).keep.added[t.label]
    other = torch.where((y==number)[:,None], 9*torch.randn_like(teacher), teacher)
    losses = [CrossEntropyLossFlat(axis=1, ignore_index=number), nn.CrossEntropyLoss(ignore_index=number), partial(F.cross_entropy, ignore_index=number)]
    for loss in losses: assert added(make(), teacher, loss)==pytest.approx(added(make(), other, loss), rel=1e-5)
    flat,known = (lambda o: o.movedim(1, -1).flatten(0, 2)),y.flatten()!=number
    t = make()
    by_pixel = t.func(flat(student)[known], flat(teacher)[known], **(dict(y=y.flatten()[known]) if t.labelled else {}))
    assert added(make(), teacher, losses[0])==pytest.approx((t.weight if not callable(t.weight) else t.weight(1.))*by_pixel.item(), rel=1e-4)

def test_an_ignored_label_that_is_mixed(trained, quiet):
    "Each image counts with that part of it which has a label"
    data = [(torch.randn(3,32,32), torch.tensor(i%3)) for i in range(24)]
    dls,found = DataLoaders(*(DataLoader(data, bs=12, shuffle=True) for _ in range(2))),[]
    class Note(Callback):
        run_valid,order = False,2
        def after_loss(self):
            lam,(a,),b = self.mix_up.lam,self.mix_up.yb1,self.y
            w = torch.lerp((a!=0).float(), (b!=0).float(), lam)
            with torch.no_grad(): each = torch.stack([kd_loss(s[None], t[None]) for s,t in zip(self.pred, trained(self.x))])
            found.append((self.learn.kd.value.item(), (.5*(each*w).sum()/w.sum()).item(), .5*each.mean().item()))
    learn = distill_learner(dls, trained.eval(), wrn(10, 1), cbs=[KD(alpha=.5), MixUp(), Note()], loss_func=CrossEntropyLossFlat(ignore_index=0), precision='float32')
    quiet(learn, 1, 1e-3)
    assert found and all(a==pytest.approx(b, rel=1e-3) and a!=pytest.approx(c, rel=1e-3) for a,b,c in found)

def test_nothing_ignored_is_the_same_to_the_last_bit():
    s,t = torch.randn(7,5,3,9),torch.randn(7,5,3,9)
    assert torch.equal(kd_loss(s, t), kd_loss(s, t, mask=torch.ones(7,3,9).bool()))
    assert kd_loss(s, t, mask=torch.zeros(7,3,9).bool())==0

@pytest.mark.parametrize('make', [lambda: KD(T=math.inf), lambda: KD(T=math.nan), lambda: AT(weight=math.nan), lambda: AT(weight=math.inf), lambda: DKD(weight=math.inf),
    lambda: FitNet(weight=SchedLin(1., math.inf)), lambda: KD(alpha=math.nan), lambda: MLKD(T=(2.,math.inf))])
def test_terms_are_finite(make):
    with pytest.raises(ValueError, match='finite|in .0,1'): make()

def test_a_term_that_is_not_finite_stops_the_fit(trained, quiet):
    def wild_loss(s, t): return (s-t).square().mean()*math.nan
    learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=[KD(), LogitKD(wild_loss)])
    with pytest.raises(ValueError, match='kd and wild returned NaN or infinity in epoch 0'): quiet(learn, 2, 1e-3)

@pytest.mark.parametrize('f', [kd_loss,sigmoid_kd_loss])
def test_logits_that_would_broadcast(f):
    with pytest.raises(ValueError, match='same shape'): f(torch.randn(5,1), torch.randn(5,2))

@pytest.mark.parametrize('f', [lambda s,y: tfkd_loss(s, y), lambda s,y: dkd_loss(s, s, y), lambda s,y: nkd_loss(s, s, y)])
def test_one_class_is_no_choice(f):
    with pytest.raises(ValueError, match='at least two classes'): f(torch.randn(4,1), torch.zeros(4).long())

def test_nst_needs_maps():
    with pytest.raises(ValueError, match='NST needs feature maps'): nst_loss(torch.randn(4,8), torch.randn(4,8))
