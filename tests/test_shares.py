"Terms that take a share of the gradient: the share is what was asked for, and nothing else changes"
import pytest
from conftest import few_digits, n_hooks, slow_but, waits_of
from fastai.vision.all import *
from kdfast.all import *
from kdfast.experiments.spec import as_published, method_table, methods, terms_of
from kdfast.losses.core import hint_loss
from kdfast.teacher.shares import Balance, gradients, norm_of, norms_of_both

class Rest(Callback):
    "The loss before terms are added"
    order = 0
    def after_loss(self): self.learn.rest = self.learn.loss_grad

class Look(Callback):
    "How large the gradient of each term with a share is beside that of the rest, batch by batch"
    order = 2
    def __init__(self): self.seen = []
    def after_loss(self):
        if not self.training: return
        terms,params = [t for t in self.learn.teacher.terms if t.share],[*self.learn.student.parameters()]
        equal = [t for t in terms if t.share=='equal']
        left,rest = (1-sum(t.share for t in terms if t not in equal))/(len(equal)+1),self.learn.rest
        for t in self.learn.teacher.terms:
            if not t.share: rest = rest + t.now*t.term() + sum(t.extras())
        rest,found = gradients(rest, params),{}
        for t in terms:
            share = left if t in equal else t.share
            a,b = norms_of_both(rest, gradients(share/left*t.balance.ratio*t.term(), params))
            found[t.label] = (b/a/(share/left)).item()
        self.seen.append(found)

def looked(terms, quiet, teacher, n=1, dls=None, **kwargs):
    learn = distill_learner(dls or few_digits(), teacher, wrn(10, 1), cbs=[*terms, Rest(), Look(), *kwargs.pop('more', [])], precision='float32', **kwargs)
    quiet(learn, n, 1e-4)
    return learn

shared = dict(at=lambda: [AT(share=.3)], kd=lambda: [KD(share=.5)], two=lambda: [KD(share=.4),FitNet(share=.3)], beside=lambda: [KD(),AT(share=.2)], sp=lambda: [SP(share=.6)],
    cc=lambda: [CC(share=.3)], dkd=lambda: [DKD(share=.3)], three=lambda: [RKD(share=.1),AT(share=.1),NST(share=.1)])

def taken(found, asked):
    "Shares of the gradient that were taken in a batch"
    beside = {k:asked[k]/(1-sum(asked.values()))*o for k,o in found.items()}
    return {k:o/(1+sum(beside.values())) for k,o in beside.items()}

@pytest.mark.parametrize('name', shared)
def test_the_share_is_what_was_asked_for(name, teacher, quiet):
    "Exactly on the first batch, on which it is measured; within a tenth over those that follow, of two fits"
    fits = [looked(shared[name](), quiet, teacher) for _ in range(2)]
    asked = {t.label:t.share for t in fits[0].teacher.terms if t.share}
    for learn in fits: assert all(o==pytest.approx(1, rel=2e-3) for o in learn.look.seen[0].values()) and n_hooks(teacher, learn.student)==0
    shares = [taken(o, asked) for learn in fits for o in learn.look.seen]
    for label,share in asked.items(): assert np.mean([o[label] for o in shares])==pytest.approx(share, rel=.1)

@pytest.mark.parametrize('more', [lambda: [MixUp()], lambda: [GradientAccumulation(40)], lambda: [GradientClip(.1)]], ids=['mixup','accumulation','clip'])
def test_the_share_under_other_callbacks(more, teacher, quiet):
    learn = looked([KD(share=.4),AT(share=.2)], quiet, teacher, more=more())
    assert all(o==pytest.approx(1, rel=2e-3) for o in learn.look.seen[0].values())

def test_the_share_in_bfloat16(native, teacher, quiet):
    learn = distill_learner(few_digits(), teacher, wrn(10, 1), cbs=[KD(share=.4),AT(share=.2),Rest(),Look()]).to_bf16()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 1, 1e-4)
    assert all(o==pytest.approx(1, rel=.1) for o in learn.look.seen[0].values())

def test_a_step_by_hand(teacher, quiet):
    "What is added is the term at the weight that gives its share"
    b = few_digits(pad=0).valid.one_batch()
    student = wrn(10, 1)
    net,t = deepcopy(student).train(),deepcopy(teacher).eval()
    x,y = (o.as_subclass(Tensor)[:20] for o in b)
    dls = DataLoaders(*(DataLoader([*zip(x, y)], bs=20) for _ in range(2)))
    learn = distill_learner(dls, teacher, student, cbs=KD(share=.25), precision='float32', opt_func=SGD, loss_func=CrossEntropyLossFlat())
    quiet(learn, 1, .1, wd=0.)
    pred = net(x)
    with torch.no_grad(): q = (t(x)/4).softmax(1)
    kd = 16*(q*(q.log()-(pred/4).log_softmax(1))).sum(1).mean()
    ps = [*net.parameters()]
    task,own = (torch.autograd.grad(o, ps, retain_graph=True) for o in (F.cross_entropy(pred, y),kd))
    norm = lambda gs: torch.cat([o.flatten() for o in gs]).norm()
    w = .25/.75*norm(task)/norm(own)
    for now,was,a,g in zip(learn.student.parameters(), ps, task, own): torch.testing.assert_close(now, was-.1*(a+w*g), rtol=1e-3, atol=1e-5)
    assert learn.recorder.history.kd[0]==pytest.approx((w*kd).item(), rel=1e-3)

def test_where_it_is_measured(teacher, quiet, monkeypatch):
    "On the first four batches of a fit, at powers of two and every hundredth, or on the first four alone; a checkpoint has what was found"
    seen,follow = [],Balance.follow
    monkeypatch.setattr(Balance, 'follow', lambda self,ratio: (seen.append(1), follow(self, ratio)))
    dls = few_digits(bs=4)
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=AT(share=.3), path=Path(tempfile.mkdtemp()))
    n = len(dls.train)
    learn.teacher.every = 10
    quiet(learn, 1, 1e-4)
    assert len(seen)==len({0,1,2,3,4,8,*range(10, n, 10)})
    learn.teacher.every = None
    seen.clear()
    quiet(learn, 1, 1e-4)
    assert len(seen)==4
    learn.save('kept')
    other = distill_learner(dls, teacher, wrn(10, 1), cbs=AT(share=.3), path=learn.path).load('kept')
    assert other.at.balance.log==learn.at.balance.log!=0 and other.at.balance.seen==learn.at.balance.seen
    assert set(torch.load(learn.path/'models/kept.pth', weights_only=False)['model'])==set(wrn(10, 1).state_dict())

def test_no_step_waits(teacher):
    make = lambda **kwargs: distill_learner(few_digits(), teacher, wrn(10, 1), cbs=[KD(),AT(**kwargs)])
    assert waits_of(make(share=.3))==waits_of(make())

def test_lr_find_forgets_what_it_measured(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=AT(share=.3), path=Path(tempfile.mkdtemp()))
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert learn.at.balance.log==0 and learn.at.balance.seen==0

def test_blocks_and_stages(dls, teacher, quiet):
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(share=.3)])
    with learn.no_bar(), learn.no_logging(): learn.fit_blocks(1, head=1)
    assert learn.kd.balance.log!=0
    learn = distill_learner(dls, teacher, wrn(10, 1), cbs=[FactorTransfer(share=.3)])
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='has no share, since .*: give it a weight'): learn.fit_two_stages(1, 1, 1e-3)
    assert n_hooks(teacher, learn.student)==0

def test_a_share_that_makes_no_sense(dls, teacher, quiet):
    for o in (0,1,1.5,-.1):
        with pytest.raises(ValueError, match='share must be a fraction'): AT(share=o)
    with pytest.raises(ValueError, match='sum to 1.1'): distill_learner(dls, teacher, wrn(10, 1), cbs=[AT(share=.6),KD(share=.5)])
    apart = FeatureKD(lambda s,t: (s.detach()*0).sum()+torch.zeros((), requires_grad=True), {'group1':'group1'}, share=.3)
    with pytest.raises(ValueError, match='reach no common parameter'): quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=apart), 1, 1e-3)
    assert apart.raw is None
    images = DataLoaders(*(DataLoader([(o,) for o in torch.randn(8,3,32,32)], bs=4) for _ in range(2)))
    with pytest.raises(ValueError, match='has no share, since .*: give it a weight'): quiet(distill_learner(images, teacher, wrn(10, 1), cbs=AT(share=.3)), 1, 1e-3)
    assert n_hooks(teacher)==0

def test_words_of_the_command():
    term, = terms_of('at:share=.3')
    assert isinstance(term, AT) and term.share==.3 and term.weight==1e3
    for o in ('at:share=.3:since=.5','at:share=.3:weight=10'):
        with pytest.raises(ValueError, match='share'): terms_of(o)
    assert method_table().loc['at','arguments'].startswith('weight=an equal share, published 1000:')

@pytest.mark.parametrize('given', [lambda: AT(weight=10., share=.3), lambda: AT(None, 10., share=.3), lambda: KD(alpha=.5, share=.3), lambda: KD(4, .5, share=.3), lambda: DKD(ramp=.1, share=.3)])
def test_a_share_and_a_weight_contradict_each_other(given):
    with pytest.raises(ValueError, match='Give exactly one of share, (weight|alpha|ramp), got'): given()
    assert DKD(alpha=2., share=.3).share==.3

def test_a_subclass_that_passes_its_arguments_on():
    class Passes(AT):
        def __init__(self, **kwargs): super().__init__(**kwargs)
    with pytest.raises(ValueError, match='Give exactly one of share, weight'): Passes(weight=1., share=.3)
    assert Passes(area=False, share=.3).share==.3

def by_hand(learn):
    "Norm of each term's gradient beside that of the labels, on the parameters that both reach, and its own"
    params = [*learn.student.parameters()]
    return {t.label: (norms_of_both(*(gradients(o, params) for o in (learn.rest,t.now*t.term()))),norm_of(gradients(t.now*t.term(), params))) for t in learn.teacher.terms}

class Fourth(Callback):
    "What terms take of the fourth batch, by hand"
    order = 2
    def after_loss(self):
        if self.training and self.iter==3: self.learn.found = by_hand(self.learn)

@pytest.mark.parametrize('terms', [lambda: [AT(**AT_CIFAR)], lambda: [RKD(weight=1.),FitNet({'group1':'group1'}, weight=100.)], lambda: [SP(weight=10.),CC(weight=1.),AT(weight=10.)]], ids=['one','two','three'])
def test_columns_tell_what_terms_with_weights_take(terms, teacher, quiet):
    learn = distill_learner(few_digits(), teacher, wrn(10, 1), cbs=[*terms(), Rest(), Fourth()], precision='float32')
    learn.teacher.columns = True
    quiet(learn, 1, 1e-4)
    ratios = {k:(b/a).item() for k,((a,b),_) in learn.found.items()}
    for k,(_,norm) in learn.found.items():
        assert learn.recorder.history[f'{k}_share'][0]==pytest.approx(ratios[k]/(1+sum(ratios.values())), rel=1e-3)
        assert learn.recorder.history[f'{k}_norm'][0]==pytest.approx(norm.item(), rel=1e-3)
    assert [*learn.recorder.history.columns][-3*len(ratios):]==[f'{k}{o}' for k in ratios for o in ('','_share','_norm')]
    told = learn.show_distill()
    for k in ratios: assert f"{learn.recorder.history[f'{k}_share'][0]:.2f}" in told
    plt.close(plot_history({'at':learn}, [f'{k}_share' for k in ratios]))

def test_columns_tell_shares_that_were_asked_for(teacher, quiet):
    learn = distill_learner(few_digits(), teacher, wrn(10, 1), cbs=[KD(share=.4),AT(share=.2),RKD(weight=1.)])
    learn.teacher.columns = True
    quiet(learn, 2, 1e-4)
    last = learn.recorder.history.iloc[0]
    assert last.kd_share==pytest.approx(.4, abs=.04) and last.at_share==pytest.approx(.2, abs=.03) and 0<last.rkd_share<1-last.kd_share-last.at_share
    assert 'gradient' not in distill_learner(few_digits(), teacher, wrn(10, 1), cbs=RKD()).show_distill()

def loud(teacher, quiet, *cbs, n=2, **kwargs):
    "Messages about what terms take, of a fit that is measured twice"
    learn = distill_learner(few_digits(bs=4), teacher, wrn(10, 1), cbs=cbs, **kwargs)
    learn.teacher.every = 4
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        quiet(learn, n, 1e-4)
    return [str(o.message) for o in found if 'of the gradient' in str(o.message)]

@pytest.mark.slow
def test_a_term_that_takes_nearly_everything_warns_once(teacher, quiet):
    said, = loud(teacher, quiet, AT(weight=1e6))
    assert re.search(r'^at has (99|100)% of the gradient in epoch 0, .*pass AT\(share=.5\)', said)
    assert len(loud(teacher, quiet, AT(weight=1e6), SP(weight=1e-3)))==1
    assert not loud(teacher, quiet, AT(weight=1e-3)) and not loud(teacher, quiet, KD(alpha=1.)) and not loud(teacher, quiet, AT(share=.95))

def test_a_term_alone_takes_everything_without_a_word(teacher, quiet):
    images = DataLoaders(*(DataLoader([(o,) for o in torch.randn(40,3,32,32)], bs=4) for _ in range(2)))
    learn = distill_learner(images, teacher, wrn(10, 1), cbs=AT())
    learn.teacher.columns = True
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet(learn, 1, 1e-4)
        assert learn.recorder.history.at_share[0]==1
    learn = distill_learner(few_digits(bs=4), teacher, wrn(10, 1), cbs=FitNet())
    learn.teacher.every = 2
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.filterwarnings('error', message='.*of the gradient')
        learn.fit_blocks(1, head=1)

def test_weights_are_measured_in_the_middle_of_every_hundred(teacher, quiet, monkeypatch):
    at = []
    monkeypatch.setattr('kdfast.teacher.callback.measure', lambda cb,*args: at.append(cb.train_iter))
    learn = distill_learner(few_digits(bs=4), teacher, wrn(10, 1), cbs=AT(weight=1e3))
    learn.teacher.every = 20
    quiet(learn, 4, 1e-4)
    assert at==[*range(10, learn.train_iter, 20)]
    n,learn.teacher.every = len(at),None
    quiet(learn, 1, 1e-4)
    assert len(at)==n>0

equals = dict(one=lambda: [AT()], two=lambda: [FitNet(),RKD()], beside=lambda: [KD(),SP()], asked=lambda: [AT(share=.4),NST(),CC()], ramp=lambda: [ReviewKD()], logits=lambda: [DKD()])

@pytest.mark.parametrize('name', equals)
def test_terms_on_features_take_an_equal_share_by_default(name, teacher, quiet):
    "As much as the loss on labels, with the terms that have weights, and each other"
    learn = looked(equals[name](), quiet, teacher)
    by_default = [t for t in learn.teacher.terms if t.share=='equal']
    assert by_default
    for t in by_default: assert learn.look.seen[0][t.label]==pytest.approx(1, rel=2e-3)
    assert learn.show_distill().count('equal share')>=len(by_default)

def test_an_equal_share_is_a_half_for_one_term(teacher, quiet):
    fits = [quiet(distill_learner(few_digits(), teacher, wrn(10, 1), cbs=term, precision='float32'), 2, 1e-3) for term in (AT(),AT(share=.5)) if not set_seed(0)]
    assert [*fits[0].recorder.losses]==[*fits[1].recorder.losses]

def test_columns_tell_equal_shares(teacher, quiet):
    "What an explicit share leaves is divided among the others and the labels"
    learn = distill_learner(few_digits(), teacher, wrn(10, 1), cbs=[AT(share=.4),NST(),CC()], precision='float32')
    learn.teacher.columns = True
    last = quiet(learn, 1, 1e-4).recorder.history.iloc[0]
    assert [last.at_share,last.nst_share,last.cc_share]==pytest.approx([.4,.2,.2], abs=.04)

def test_a_weight_ends_the_equal_share():
    at = AT()
    assert (at.share,at.weight)==('equal',1e3)
    at.weight = 10.
    assert (at.share,at.weight)==(None,10.) and AT(weight=10.).share is None and AT(**AT_CIFAR).share is None
    assert KD().share is None and SimKD().share is None and FactorTransfer().share is None
    assert FeatureKD(hint_loss).share=='equal' and FeatureKD(hint_loss, weight=1.).share is None

def test_a_ramp_is_of_a_weight():
    for make,published in ((DKD,1.),(ReviewKD,5.)):
        assert make().share=='equal' and make(ramp=.5).share is None
        assert (make(ramp=.5).weight(.25),make(ramp=.5, weight=3.).weight(1.),make(ramp=0.).weight) == (published/2,3.,published)
        assert make().weight(1/24)==pytest.approx(published/2)

class Mine(FeatureKD):
    "A term with a weight of its own"
    def __init__(self, pairs=None): super().__init__(hint_loss, pairs, weight=3.)

def test_a_class_may_choose_its_weight(): assert (Mine().share,Mine().weight,Mine(share=.2).share)==(None,3.,.2)

def test_published_weights_are_used_where_there_are_no_labels(teacher, quiet):
    "Without targets, and in a first stage"
    images = lambda: DataLoaders(*(DataLoader([(o,) for o in torch.linspace(-1, 1, 8*3*32*32).view(8,3,32,32)], bs=4) for _ in range(2)))
    for dls,how,args in ((images,'fit',(1,1e-4)), (few_digits,'fit_two_stages',(1,0,1e-4))):
        values = []
        for term in (FitNet(),FitNet(weight=100.)):
            set_seed(0)
            learn = distill_learner(dls(), teacher, wrn(10, 1), cbs=term, precision='float32')
            values.append(first(quiet(learn, *args, how=how).recorder.history.fitnet))
        assert values[0]==values[1]>10
    assert ' 100 ' in distill_learner(images(), teacher, wrn(10, 1), cbs=FitNet()).show_distill()

def test_layers_that_do_not_train_take_no_share(teacher, quiet):
    "As in the first epoch of fine_tune, where only the head and the adapters train"
    net = wrn(10, 1)
    learn = distill_learner(few_digits(), teacher, net, cbs=[AT(),FitNet()], splitter=lambda m: L(nn.Sequential(*[*m.children()][:-1]), m[-1]).map(params))
    quiet(learn, 1, 1e-3, how='fine_tune')
    assert learn.at.balance.log.isfinite() and learn.at.balance.seen>0 and not learn.at.apart

class Again(nn.Module):
    "A body that is computed again for its gradients"
    def __init__(self, net, reentrant): super().__init__(); self.net,self.reentrant = net,reentrant
    def forward(self, x): return torch.utils.checkpoint.checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)

def once(student):
    student.compile(backend='aot_eager')
    return student

@pytest.mark.parametrize('student', [lambda: Again(wrn(10, 1), True), lambda: once(wrn(10, 1))], ids=['reentrant','compiled'])
def test_a_network_whose_gradients_cannot_be_measured(student, teacher, quiet):
    "Trains with weights, and show_distill tells; a share is an error"
    torch._dynamo.reset()
    learn = distill_learner(few_digits(), teacher, student(), cbs=KD())
    learn.teacher.columns,learn.teacher.every = True,2
    quiet(learn, 1, 1e-4)
    told = learn.show_distill()
    assert ('cannot be measured' in told)==bool(learn.teacher.unmeasured) and 'gradient ' not in told and learn.recorder.history.kd_share.isna().all()
    learn = distill_learner(few_digits(), teacher, student(), cbs=DKD())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        quiet(learn, 1, 1e-4)
    if learn.teacher.unmeasured: assert sum('Published weights are used' in str(o.message) for o in found)==1 and '0 → 1 → 1' in learn.show_distill()
    learn = distill_learner(few_digits(), teacher, student(), cbs=KD(share=.3))
    with pytest.raises(ValueError, match="kd has no share, since (this network's gradients|it and the labels)"): quiet(learn, 1, 1e-4)
    assert n_hooks(learn.student)==0

@pytest.mark.slow
def test_a_share_follows_gradients_that_change(trained, quiet):
    "At a usual learning rate the ratio changes several times over in 80 batches"
    def drift(every):
        learn = distill_learner(few_digits(repeat=20), trained, wrn(10, 1), cbs=[AT(share=.3), Rest(), Look()])
        learn.teacher.every = every
        quiet(learn, 1, 1e-2, how='fit_one_cycle')
        return abs(np.mean([np.log(o['at']) for o in learn.look.seen[64:]]))
    assert drift(100)<.7 and drift(100)<drift(None)

def test_what_a_term_trains_beside_the_student_learns_with_a_share(teacher, quiet):
    "Peers of DML have their own loss on labels, and the paraphraser of FactorTransfer its own reconstruction"
    for term,part in ((DML(share=.5),'peer0'), (FactorTransfer(share=.5),None)):
        learn = distill_learner(few_digits(), teacher if term.taught else None, wrn(10, 1), cbs=term)
        made = learn.teacher.terms[0].adapters
        net = made[part] if part else first(made.values()).paraphraser
        before = {k:o.clone() for k,o in net.named_parameters()}
        quiet(learn, 1, 1e-2, wd=0.)
        assert all(not torch.equal(o, before[k]) for k,o in net.named_parameters() if o.requires_grad)

named = [k for k,c in methods().items() if k!='sigmoidkd' and not hasattr(c, 'build')]

@pytest.mark.parametrize('name', slow_but(*named[::3], of=named))
def test_every_method_is_measured(name, teacher, quiet):
    "With its default weight and with half of the gradient"
    for term in terms_of(name)+terms_of(f'{name}:share=.5'):
        learn = distill_learner(few_digits(valid=20), teacher if term.taught else None, wrn(10, 1), cbs=term)
        learn.teacher.columns = True
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quiet(learn, 1, 1e-4)
        share = learn.recorder.history[f'{term.label}_share'][0]
        assert share==pytest.approx(.5, abs=.1) if term.share else 0<share<=1

def test_the_tables_of_papers_have_weights():
    for k in methods():
        term, = terms_of(as_published(k))
        assert term.share is None
        if term.balances: assert [o.weight(1.) if callable(o.weight) else o.weight for o in (term,*terms_of(k))]==[type(term).published]*2
