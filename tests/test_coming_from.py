"Each row of howto/coming_from.ipynb against a step of a loop in the other code's convention: same weights, same batch, plain SGD"
import json, re, pytest
from types import SimpleNamespace
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.adapters import adapters_of
from kdfast.experiments.run import published_sgd
from kdfast.losses.core import kd_loss

cells = json.loads((Path(__file__).parent.parent/'nbs/howto/coming_from.ipynb').read_text())['cells']
text = {kind:[''.join(c['source']) for c in cells if c['cell_type']==kind] for kind in ('markdown','code')}
rows = dict(re.findall(r'^\| `(.+?)` \| `(.+)` \|$', '\n'.join(text['markdown']), re.M))
space = dict(globals())
for o in text['code']:
    if o.startswith(('def ','class ','published')): exec(o.partition('\nlearn = ')[0], space)

# What a loop written by hand has at a step

class Heads(nn.Module):
    "A student with a distillation token: two logits in training, their mean otherwise"
    def __init__(self, net):
        super().__init__()
        self.body,self.fc,self.token = net[:-1],net[-1],nn.Linear(net[-1].in_features, 10)

    def forward(self, x):
        x = self.body(x)
        outs = self.fc(x),self.token(x)
        return outs if self.training else sum(outs)/2

def run(net, x):
    "Logits, outputs of groups and pool, what the ReLUs after the groups take, and the last feature maps"
    body,maps = getattr(net, 'body', net),{}
    for n,m in body.named_children(): x = maps[n] = m(x)
    feats = [maps[n] for n in ('group1','group2','group3')]
    pre = [f(o) for f,o in zip((body.group2[0].bn1,body.group3[0].bn1,body.bn), feats)]
    return x,feats,pre,maps['act'].mean((2,3)),maps['act']

def at_a_step(learn, teacher, x, y):
    student,adapters = deepcopy((learn.student, {k:m for k,m in adapters_of(learn.model).items()}))
    o = SimpleNamespace(student=student.train(), adapters={k:m.train() for k,m in adapters.items()}, y=y, n=len(x))
    o.logits,o.s,o.s_pre,o.vector,o.last = run(student, x)
    if isinstance(student, Heads): o.logits,o.token = student.fc(o.logits),student.token(o.logits)
    with torch.no_grad():
        o.soft,o.t,o.t_pre,o.t_vector,o.t_last = run(deepcopy(teacher).eval(), x)
        last = torch.channels_last  # as the copy computes, to the last bit: OFD counts what is above zero, however little
        o.t_moving = run(deepcopy(teacher).train().to(memory_format=last), x.contiguous(memory_format=last))[2]
    o.norms = [teacher.group2[0].bn1,teacher.group3[0].bn1,teacher.bn]
    if o.logits.ndim==2: o.ce = F.cross_entropy(o.logits, y)
    return o

# Terms by hand

def kl(s, t, T, reduction='batchmean'): return F.kl_div((s/T).log_softmax(1), (t/T).softmax(1), reduction=reduction)

def soft(o, T): return T**2*kl(o.logits, o.soft, T)

def attention(x): return F.normalize(x.pow(2).mean(1).flatten(1))

def at(o, groups=(0,1,2)): return sum((attention(o.s[i])-attention(o.t[i])).pow(2).mean() for i in groups)

def hint(o):
    conv,norm,_ = o.adapters['fitnet_group2']
    return F.mse_loss(norm(F.conv2d(o.s[1], conv.weight, conv.bias)).relu(), o.t[1])

def sp(o):
    g = lambda x: F.normalize(x.flatten(1)@x.flatten(1).T)
    return (g(o.s[2])-g(o.t[2])).pow(2).sum()/o.n**2

def vid(o):
    res = 0.
    for i,(s,t) in enumerate(zip(o.s, o.t)):
        m = o.adapters[f'vid_group{i+1}']
        a,b,c = (k for k in m.mean if isinstance(k, nn.Conv2d))
        var = (m.rho.exp()+1).log()[:,None,None]+1e-5
        res = res + ((c(b(a(s).relu()).relu())-t)**2/var + var.log()).mean()/2
    return res

def rkd(o):
    def distances(x):
        d = ((x[:,None]-x)**2).sum(2).clamp(min=1e-12).sqrt()*(1-torch.eye(len(x)))
        return d/d[d>0].mean()
    def angles(x):
        e = F.normalize(x[None]-x[:,None], dim=2)
        return torch.einsum('iad,ibd->iab', e, e)
    return sum(w*F.smooth_l1_loss(f(o.vector), f(o.t_vector)) for w,f in ((25,distances),(50,angles)))

def pkt(o):
    def p(x):
        x = x/(x.norm(dim=1, keepdim=True)+1e-7)
        k = (x@x.T+1)/2
        return k/k.sum(1, keepdim=True)
    s,t = p(o.vector),p(o.t_vector)
    return (t*((t+1e-7)/(s+1e-7)).log()).mean()

def nst(o):
    k = lambda a,b: torch.einsum('nap,nbp->nab', a, b).pow(2).mean()
    pairs = [[F.normalize(x.flatten(2), dim=2) for x in p] for p in zip(o.s, o.t)]
    return sum(k(t, t) + k(s, s) - 2*k(s, t) for s,t in pairs)

def dkd(o, alpha=1., beta=8., T=4.):
    right = F.one_hot(o.y, 10).bool()
    two = lambda z: torch.stack([(z/T).softmax(1)[right], 1-(z/T).softmax(1)[right]], 1)
    others = lambda z: z[~right].view(o.n, -1)
    return T**2*(alpha*F.kl_div(two(o.logits).log(), two(o.soft), reduction='batchmean') + beta*kl(others(o.logits), others(o.soft), T))

def ofd(o):
    "The teacher in training mode, the sum over all positions divided by the number of images"
    res = 0.
    for i,(n,norm,t) in enumerate(zip(('group2_0_bn1','group3_0_bn1','bn'), o.norms, o.t_moving)):
        mean,std,s = norm.bias.detach().double(),norm.weight.detach().abs().double(),o.adapters['ofd_'+n](o.s_pre[i])
        cdf = (1+torch.erf(-mean/std/2**.5))/2
        m = torch.where(cdf>1e-3, mean - std*(-(mean/std)**2/2).exp()/(2*math.pi)**.5/cdf, -3*std).float()[:,None,None]
        loss = (s-m)**2*((s>m)&(t<=m)) + (s-t)**2*((s>t)&(t>m)&(t<=0)) + (s-t)**2*(t>0)
        res = res + loss.sum()/2**(2-i)/o.n
    return res

def review(o):
    "The student's stages and pooled features, through what fuses them, against the teacher's before the activation"
    def hcl(s, t):
        sizes = [s.shape[2], *(k for k in (4,2,1) if k<s.shape[2])]
        each = [.5**i*F.mse_loss(F.adaptive_avg_pool2d(s, k), F.adaptive_avg_pool2d(t, k)) for i,k in enumerate(sizes)]
        return sum(each)/sum(.5**i for i in range(len(each)))
    ours = o.adapters['reviewkd_review']([*o.s, o.vector[...,None,None]])
    return sum(map(hcl, ours, [*o.t_pre, o.t_vector[...,None,None]]))

def standardized(z): return (z-z.mean(1, keepdim=True))/(1e-7+z.std(1, keepdim=True))

def pooled_hint(o):
    linear, = o.adapters['fitnet_pool']
    return F.mse_loss(linear(o.vector[...,None,None]).flatten(1), o.t_vector)

loops = {
    '--distill kd -r .1 -a .9 -b 0': lambda o: .1*o.ce + .9*soft(o, 4),
    '--distill kd -r .5 -a .9 -b 0': lambda o: .5*o.ce + .9*soft(o, 4),
    '--distill attention -r 1 -a 0 -b 1000': lambda o: o.ce + 1000*at(o),
    '--distill attention -r 1 -a 1 -b 1000': lambda o: o.ce + soft(o, 4) + 1000*at(o),
    '--distill attention -r .1 -a .9 -b 1000': lambda o: .1*o.ce + .9*soft(o, 4) + 1000*at(o),
    '--distill hint --hint_layer 2 -r 1 -a 0 -b 100': lambda o: o.ce + 100*hint(o),
    '--distill similarity -r 1 -a 0 -b 3000': lambda o: o.ce + 3000*sp(o),
    '--distill vid -r 1 -a 0 -b 1': lambda o: o.ce + vid(o),
    '--distill rkd -r 1 -a 0 -b 1': lambda o: o.ce + rkd(o),
    '--distill pkt -r 1 -a 0 -b 30000': lambda o: o.ce + 30000*pkt(o),
    '--distill nst -r 1 -a 0 -b 50': lambda o: o.ce + 50*nst(o),
    'KD.TEMPERATURE 4, KD.LOSS.CE_WEIGHT 0.1, KD.LOSS.KD_WEIGHT 0.9': lambda o: .1*o.ce + .9*soft(o, 4),
    'KD.TEMPERATURE 1, KD.LOSS.CE_WEIGHT 0.5, KD.LOSS.KD_WEIGHT 0.5': lambda o: .5*o.ce + .5*soft(o, 1),
    'DKD.CE_WEIGHT 1, DKD.ALPHA 1, DKD.BETA 8, DKD.T 4, after DKD.WARMUP': lambda o: o.ce + dkd(o),
    'AT.LOSS.CE_WEIGHT 1, AT.LOSS.FEAT_WEIGHT 1000': lambda o: o.ce + 1000*at(o),
    'FITNET.HINT_LAYER 2, FITNET.LOSS.FEAT_WEIGHT 100': lambda o: o.ce + 100*hint(o),
    'OFD.LOSS.CE_WEIGHT 1, OFD.LOSS.FEAT_WEIGHT 0.001': lambda o: o.ce + .001*ofd(o),
    'REVIEWKD.CE_WEIGHT 1, REVIEWKD.REVIEWKD_WEIGHT 5, after REVIEWKD.WARMUP_EPOCHS': lambda o: o.ce + 5*review(o),
    'KDLoss: temperature 4, alpha 0.9': lambda o: .9*o.ce + (1-.9)*4**2*kl(o.logits, o.soft, 4),
    'KDLoss: temperature 4, alpha 0.5, beta 2': lambda o: .5*o.ce + 2*4**2*kl(o.logits, o.soft, 4),
    'KDLoss: temperature 4, alpha 0': lambda o: kl(o.logits, o.soft, 4),
    'CrossEntropyLoss: weight 1; ATLoss: weight 1000, pairs group2 and group3': lambda o: o.ce + 1000*at(o, (1,2)),
    'LogitStdKDLoss: temperature 2, alpha 0.1, beta 9': lambda o: .1*o.ce + 9*2**2*kl(*map(standardized, (o.logits,o.soft)), 2),
    'DeiT: --distillation-type hard --distillation-alpha 0.5, one head': lambda o: .5*o.ce + .5*F.cross_entropy(o.logits, o.soft.argmax(1)),
    'DeiT: --distillation-type hard --distillation-alpha 0.5': lambda o: .5*o.ce + .5*F.cross_entropy(o.token, o.soft.argmax(1)),
    'DeiT: --distillation-type soft --distillation-alpha 0.1 --distillation-tau 3':
        lambda o: .9*o.ce + .1*kl(o.token, o.soft, 3, 'sum')*3**2/o.token.numel(),
    "TokenDistillationTask: distill_type='soft', temperature 3, task_loss_weight 0.5": lambda o: .5*o.ce + .5*3**2*kl(o.token, o.soft, 3),
    'LogitDistillationTask: temperature 1': lambda o: o.ce + kl(o.logits, o.soft, 1),
    'LogitDistillationTask: temperature 4, task_loss_weight 0.3': lambda o: .3*o.ce + .7*soft(o, 4),
    'LogitDistillationTask: temperature 4, task_loss_weight 0.3, distill_loss_weight 2': lambda o: .3*o.ce + 2*soft(o, 4),
    'FeatureDistillationTask: distill_loss_weight 5': lambda o: o.ce + 5*pooled_hint(o),
    'overhaul-distillation, ImageNet: loss_distill.sum() / batch_size / 10000': lambda o: o.ce + ofd(o)/10000,
    'SimKD: -c 0 -d 0 -b 1 --factor 2': lambda o: F.mse_loss(o.student.projector(o.last), o.t_last)}

def test_every_row_has_a_loop(): assert [*rows]==[*loops]

def a_batch(n=16):
    "With an image that is there twice"
    x,y = torch.randn(n, 3, 32, 32),torch.randint(10, (n,))
    x[1] = x[0]
    return x,y,DataLoaders(*(DataLoader([*zip(x, y)], bs=n) for _ in range(2)))

def change(net, before): return torch.cat([(p-q).flatten() for p,q in zip(net.parameters(), before)]).detach()

@pytest.mark.parametrize('row', loops)
def test_a_step(row, trained, quiet):
    "The student's weights change as in the other code"
    x,y,dls = a_batch()
    student = Heads(wrn(10, 1)) if 'Token' in rows[row] else wrn(10, 1)
    learn = distill_learner(dls, trained, student, cbs=eval(rows[row], space), precision='float32', loss_func=space['label_loss'],
        opt_func=partial(SGD, mom=0.), wd=0.)
    o = at_a_step(learn, trained, x, y)
    before = [p.detach().clone() for p in o.student.parameters()]
    parameters = [*o.student.parameters(), *(p for m in o.adapters.values() for p in m.parameters())]
    opt = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=.01)
    loops[row](o).backward()
    opt.step()
    quiet(learn, 1, .01)
    hand,ours = (change(net, before) for net in (o.student,learn.student))
    assert hand.norm()>0 and (ours-hand).norm()<2e-4*hand.norm()

def test_the_optimizer_of_other_codes(quiet):
    "Momentum and weight decay as torch.optim has them, over several steps; each setting counts"
    x,y,dls = a_batch()
    net = wrn(10, 1)
    by_hand,before = deepcopy(net).train(),[p.detach().clone() for p in net.parameters()]
    opt = torch.optim.SGD(by_hand.parameters(), lr=.01, momentum=.9, weight_decay=1.)
    for _ in range(4):
        opt.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        opt.step()
    hand,settings = change(by_hand, before),{**space['published'], 'wd':1.}
    def away(**kwargs):
        learn = quiet(Learner(dls, deepcopy(net), loss_func=space['label_loss'], **{**settings, **kwargs}), 4, .01)
        return ((change(learn.model, before)-hand).norm()/hand.norm()).item()
    assert away()<1e-3 and min(away(opt_func=partial(SGD, mom=.9)), away(opt_func=partial(SGD, decouple_wd=False)), away(wd_bn_bias=False))>1e-2
