"Teachers of any origin: what they expect of images and classes, and any architecture for any other"
import timm, torchvision.models as tvm
from fastai.vision.all import *
from kdfast.all import *
from kdfast.core import random_like
from kdfast.layers.maps import ToChannelsFirst, layouts_of, Tokens
from kdfast.layers.taps import calls_of
from kdfast.look.probe import features_of, knn_accuracy
from kdfast.teacher.callback import TeacherCallback
from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextModel, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel
import pytest
from conftest import few_digits, slow_but

class Data(list):
    loss_func = CrossEntropyLossFlat()
    def new_empty(self): return Data()

def image_dls(n=8, size=64, c=10, vocab=None, labelled=True, stats=None):
    g = torch.Generator().manual_seed(0)
    data = Data((torch.randn(3,size,size, generator=g), *([torch.tensor(i%c)] if labelled else [])) for i in range(n))
    tfms = Pipeline([Normalize.from_stats(*stats, cuda=False)] if stats else [])
    dls = DataLoaders(*(DataLoader(data, bs=4, n_inp=1, after_batch=tfms) for _ in range(2)), device='cpu')
    dls.c = c
    if vocab: dls.vocab = vocab
    return dls

hf_vit = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=16)
hf_convnext = dict(hidden_sizes=[8,16,32,64], depths=[1,1,2,1])
def with_a_head(vit):
    nn.init.normal_(vit.heads.head.weight)  # torchvision's is zero
    return vit

def of_timm(name, **kw): return lambda c: timm.create_model(name, num_classes=c, **kw)
def as_hf(config, headless, whole, **kw): return lambda c: whole(config(**kw, num_labels=c)) if c else headless(config(**kw))

teachers = {'resnet18':of_timm('resnet18'), 'convnext_atto':of_timm('convnext_atto'), 'mobilenetv3':of_timm('mobilenetv3_small_050'),
    'efficientnet_lite0':of_timm('tf_efficientnet_lite0'), 'vit_tiny':of_timm('vit_tiny_patch16_224', img_size=64, depth=6),
    'deit_distilled':of_timm('deit_tiny_distilled_patch16_224', img_size=64, depth=6), 'swin_tiny':of_timm('swin_tiny_patch4_window7_224', img_size=64),
    'tv_vit':lambda c: with_a_head(tvm.VisionTransformer(64, 16, 4, 2, 32, 64, num_classes=c or 7)),
    'hf_vit':as_hf(ViTConfig, ViTModel, ViTForImageClassification, **hf_vit),
    'hf_convnext':as_hf(ConvNextConfig, ConvNextModel, ConvNextForImageClassification, **hf_convnext)}
students = {'wrn':partial(wrn, 10, 1), 'resnet':partial(resnet, 10, width=.25), 'mobilenetv3':lambda: timm.create_model('mobilenetv3_small_050', num_classes=10),
    'vit_tiny':lambda: timm.create_model('vit_tiny_patch16_224', img_size=64, depth=4, num_classes=10), 'tv_shufflenet':partial(tvm.shufflenet_v2_x0_5, num_classes=10)}
methods = {'kd':KD, 'default':None, 'fitnet':FitNet, 'at':AT, 'rkd':RKD}

class Gradients(Callback):
    "The student's largest gradient in each step, without those of the labels"
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append(max(p.grad.abs().max().item() for p in self.learn.student.parameters() if p.grad is not None))

@pytest.fixture(scope='module')
def nets(): return {k:{c:f(c) for c in (0,10)} for k,f in teachers.items()}

@pytest.mark.parametrize('method', slow_but('kd', 'default', of=methods))
@pytest.mark.parametrize('student', slow_but('wrn', 'vit_tiny', of=students))
@pytest.mark.parametrize('teacher', teachers)
def test_any_teacher_and_any_student(teacher, student, method, nets, tmp_path, quiet):
    "Two batches; the gradient of the term alone reaches the student, is finite and is not zero; the student is exported"
    term,net = methods[method],Teacher(nets[teacher][10 if method=='kd' else 0], size=64)
    learn = distill_learner(image_dls(), net, students[student](), cbs=[Gradients(), *([term()] if term else [])],
        precision='float32', path=tmp_path, loss_func=lambda p,y: 0*p.sum())
    quiet(learn, 1, 1e-3)
    assert len(learn.gradients.seen)==2 and all(0<o<math.inf for o in learn.gradients.seen)
    assert load_learner(learn.export_student()).model(torch.zeros(2,3,64,64)).shape==(2,10)

# Classes

class Shown(nn.Module):
    "Logits that are the same for each image, but for a little"
    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(n).float())
    def forward(self, x): return self.scale + x.mean((1,2,3))[:,None]

def picked(dls, teacher, **kwargs):
    "The teacher's logits that terms read in the first batch"
    found = []
    class Look(Callback):
        order,run_valid = TeacherCallback.order+1,False
        def after_pred(self): found.append(self.learn.teacher.out.clone())
    learn = distill_learner(dls, teacher, resnet(10, width=.25, n_out=dls.c), cbs=[KD(), Look()], precision='float32', loss_func=CrossEntropyLossFlat(), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return (found[0]-found[0].min(1, keepdim=True)[0]).round()[0].tolist()

@pytest.mark.parametrize('vocab', [['fox','cat','dog','emu'], [1,3,0]])
def test_classes_are_picked_in_the_students_order(vocab):
    dls = image_dls(c=3, vocab=['cat','emu','fox'])
    assert picked(dls, Shown(4), teacher_vocab=vocab)==[1,3,0]
    assert picked(dls, Teacher(Shown(4), vocab=vocab))==[1,3,0]

def test_a_learners_classes_are_matched(tmp_path):
    theirs,ours = image_dls(c=4, vocab=['fox','cat','dog','emu']),image_dls(c=3, vocab=['cat','emu','fox'])
    learn = Learner(theirs, Shown(4), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    assert picked(ours, learn)==[1,3,0]

def test_classes_that_the_teacher_lacks():
    dls,learn = image_dls(c=3, vocab=['cat','owl','fox']),Learner(image_dls(c=4, vocab=['fox','cat','dog','emu']), resnet(10, width=.25, n_out=4), loss_func=CrossEntropyLossFlat())
    student = partial(resnet, 10, width=.25, n_out=3)
    for kw in (dict(teacher=Shown(4), teacher_vocab=['fox','cat','dog','emu']), dict(teacher=learn, cbs=KD())):
        with pytest.raises(ValueError, match='lacks the classes owl'): distill_learner(dls, student=student(), **kw)
    assert not hasattr(distill_learner(dls, learn, student()), 'kd')
    distill_learner(dls, learn, student(), cbs=FitNet())
    with pytest.raises(ValueError, match='2 output indices for 3 classes'): distill_learner(dls, Shown(4), student(), teacher_vocab=[0,1])
    for vocab,told in ((['owl','cat','fox'],'4 outputs, but 3 names'), ([0,1,4],'indices from 0 to 4'), ([0,1,-1],'indices from -1 to 1')):
        with pytest.raises(ValueError, match=told): distill_learner(dls, Shown(4), student(), teacher_vocab=vocab)
    with pytest.raises(ValueError, match='no vocab'): distill_learner(image_dls(c=3), Shown(4), student(), teacher_vocab=['a','b','c'])

def test_a_cache_knows_which_classes_were_picked(tmp_path, quiet):
    dls,student = image_dls(c=2, vocab=['cat','emu']),partial(resnet, 10, width=.25, n_out=2)
    fit = lambda vocab: quiet(distill_learner(dls, Shown(3), student(), cbs=[KD(), TeacherCache(tmp_path/'c')], teacher_vocab=vocab), 1, 1e-3)
    fit([0,2])
    fit([0,2])
    with pytest.raises(ValueError, match=r"outputs \[0, 2\], not \[0, 1\]"): fit([0,1])

# What it sees

def seen(dls, teacher, **kwargs):
    "What the teacher is given for a batch, and the student's inputs"
    cb = distill_learner(dls, teacher, resnet(10, width=.25), cbs=FitNet(), **kwargs).teacher
    x = torch.randn(2,3,64,64)
    return tuplify(cb.tfm(x) if cb.tfm else x)[0],x

def test_what_a_network_of_timm_sees():
    "Its record is read, and `tfm` adds to it"
    dls = image_dls(stats=cifar_stats)
    mean,std = (torch.tensor(o)[:,None,None] for o in cifar_stats)
    for tfm,add in ((None,0), (lambda x: x+1, 1)):
        got,x = seen(dls, timm.create_model('tf_efficientnet_lite0'), tfm=tfm)
        there = F.interpolate(x*std+mean, (224,224), mode='bicubic', antialias=True)
        torch.testing.assert_close(got, (there-.5)/.5+add, rtol=1e-4, atol=1e-4)

def test_a_head_that_was_replaced_has_no_record():
    got,x = seen(image_dls(stats=cifar_stats), timm.create_model('resnet18', num_classes=10))
    assert torch.equal(got, x)

def test_what_a_hugging_face_model_sees(tmp_path):
    "The processor that lies beside it"
    ViTModel(ViTConfig(**hf_vit)).save_pretrained(tmp_path)
    ViTImageProcessor(size=dict(height=64, width=64), image_mean=[.1,.2,.3], image_std=[.5,.6,.7]).save_pretrained(tmp_path)
    got,x = seen(image_dls(stats=([0.,0.,0.],[1.,1.,1.])), ViTModel.from_pretrained(tmp_path))
    want = (x - torch.tensor([.1,.2,.3])[:,None,None])/torch.tensor([.5,.6,.7])[:,None,None]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

def test_what_is_passed_with_a_teacher():
    "Statistics as a list, a processor without a size, a file that is not there"
    assert isinstance(Teacher(resnet(10), stats=[[.5]*3,[.5]*3]).stats, Normalize)
    teacher = Teacher(resnet(10), stats=SimpleNamespace(image_mean=[.5]*3, image_std=[.5]*3, resample=3))
    assert (teacher.size,teacher.mode,teacher.known)==(None,'bicubic',True)
    for file in ('teacher.pkl', Path('teacher.pth'), 'models/teacher'):
        with pytest.raises(FileNotFoundError): Teacher(file)

def test_a_member_of_a_weights_enum(tmp_path, monkeypatch):
    "A file in torch's cache stands in for the download"
    weights,net = tvm.MobileNet_V3_Small_Weights.IMAGENET1K_V1,tvm.mobilenet_v3_small(weights=None)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path/'hub'/'checkpoints'/Path(weights.url).name)
    teacher = Teacher(weights)
    assert torch.equal(teacher.network.features[0][0].weight, net.features[0][0].weight)
    assert (teacher.size,teacher.mode,len(teacher.vocab),teacher.vocab[207])==((224,224),'bilinear',1000,'golden retriever')

def test_the_name_of_a_network(tmp_path):
    net = timm.create_model('mobilenetv3_small_050')
    torch.save(net.state_dict(), tmp_path/'w.pth')
    dls = image_dls(c=2, vocab=['n01440764','n03888257'])
    learn = distill_learner(dls, Teacher('mobilenetv3_small_050', weights=tmp_path/'w.pth'), resnet(10, width=.25, n_out=2))
    assert learn.teacher.picks==[0,701] and hasattr(learn, 'kd')
    with pytest.raises(ValueError, match='cannot be read from'): Teacher('resnet18', weights=tmp_path/'w.pth')
    with pytest.raises(ValueError, match="did you mean 'resnet18'"): Teacher('resnet_18')
    with pytest.raises(ValueError, match="did you mean 'resnet18'"): distill_learner(dls, Shown(2), 'resnet_18')

def test_a_transformer_of_another_size(tmp_path):
    "Its position embeddings are resampled, from a file as from a download; all other weights are the file's"
    net = timm.create_model('test_vit')
    torch.save(net.state_dict(), tmp_path/'w.pth')
    teacher = Teacher('test_vit', weights=tmp_path/'w.pth', size=96)
    assert tuple(teacher.size)==(96,96) and teacher.network.pos_embed.shape!=net.pos_embed.shape
    ours,theirs = net.state_dict(),teacher.network.state_dict()
    assert all(torch.equal(ours[k], v) for k,v in theirs.items() if k!='pos_embed')
    assert teacher.network(torch.zeros(1,3,96,96)).shape==(1,1000)

# The default

def test_the_default_says_what_it_took_and_why():
    dls = image_dls()
    assert 'It teaches' not in str(distill_learner(dls, resnet(10, width=.5), resnet(10, width=.25)).show_distill())
    learn = distill_learner(dls, timm.create_model('resnet18', num_classes=0), resnet(10, width=.25))
    said = str(learn.show_distill())
    assert not hasattr(learn, 'kd') and learn.fitnet.standardize and 'fitnet' in said and 'its outputs are (512,) and the student\'s (10,)' in said

def test_outputs_that_differ_where_nothing_else_can_teach():
    mlp = lambda c: nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, c))
    with pytest.raises(ValueError, match='must have the same outputs'): distill_learner(image_dls(), mlp(3), mlp(10))

def test_features_that_do_not_depend_on_the_image(quiet):
    net = timm.create_model('mobilenetv3_small_050', num_classes=0)
    for p in net.parameters(): nn.init.zeros_(p)
    with pytest.raises(ValueError, match='the same for all images'): quiet(distill_learner(image_dls(), net, resnet(10, width=.25), cbs=FitNet()), 1, 1e-3)

def test_features_that_are_not_finite():
    net = timm.create_model('mobilenetv3_small_050', num_classes=0)
    net.conv_stem.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match='NaN'): distill_learner(image_dls(), net, resnet(10, width=.25), cbs=FitNet())

# Layouts

def test_tokens_of_patches_that_are_merged():
    "Nothing is taken for tokens that are not"
    grids = lambda net,x: {type(o) for o in layouts_of(calls_of(net, x)).values()}
    x = torch.zeros(2,3,64,64)
    assert grids(tvm.resnet18(weights=None), x)==set()
    assert grids(timm.create_model('convnext_atto'), x)<={ToChannelsFirst}
    assert grids(nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(64, 5)), x)==set()

def test_a_token_is_the_patch_at_its_place():
    "A patch that differs shows at its own position, whatever the grid"
    net = timm.create_model('vit_tiny_patch16_224', img_size=(64,32), depth=1).eval()
    x = torch.zeros(1,3,64,32)
    layout = layouts_of(calls_of(net, x))['patch_embed']
    x[:,:,48:,16:] = 1.
    with torch.no_grad(): maps = layout(net.patch_embed(x))[0]
    differs = (maps-maps[:,:1,:1]).abs().amax(0)>1e-6
    assert maps.shape[1:]==(4,2) and differs.nonzero().tolist()==[[3,1]]

def test_swins_channels_come_first():
    net = timm.create_model('swin_tiny_patch4_window7_224', img_size=64).eval()
    calls = calls_of(net, random_like((torch.zeros(1,3,64,64),)))
    out = next(o for n,_,_,o,_ in calls if n=='layers.1')
    assert torch.equal(layouts_of(calls)['layers.1'](out), out.permute(0,3,1,2))

def test_pairs_of_networks_that_see_other_sizes():
    "By depth, unless the last stages correspond: some sizes would agree by chance"
    x,large = torch.zeros(1,3,32,32),lambda x: F.interpolate(x, (224,224))
    assert pair_layers(wrn(10, 1), tvm.resnet18(weights=None), x, tfm=large)=={'group1':'layer2','group2':'layer3','group3':'layer4'}
    assert pair_layers(resnet(10), tvm.resnet18(weights=None), torch.zeros(1,3,128,128), tfm=large)=={f'layer{i}':f'layer{i}' for i in (1,2,3,4)}

# Without labels

@pytest.mark.parametrize('term', [None,KD,Similarity,FitNet])
def test_no_labels(term, quiet):
    "Two batches without targets; the student learns, and nothing of the label loss is left"
    student = resnet(10, width=.25)
    before = deepcopy(student.state_dict())
    learn = distill_learner(image_dls(labelled=False), resnet(10, width=.5), student, cbs=[term()] if term else None)
    assert hasattr(learn, (term or KD).__name__.lower())
    quiet(learn, 1, 1e-2)
    assert any(not torch.equal(v, before[k]) for k,v in student.state_dict().items())
    assert math.isfinite(learn.recorder.values[0][-1]) and learn.recorder.values[0][-1]>0

def test_convnets_without_a_size_in_common_are_paired_by_depth(quiet):
    student = nn.Sequential(ConvLayer(3, 8, stride=3), ConvLayer(8, 16, stride=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    learn = distill_learner(image_dls(size=32), wrn(10, 2), student, cbs=[AT(), FitNet()])
    assert learn.at.layers=={'1':'group3'}
    quiet(learn, 1, 1e-3)

# The probe

def test_votes_by_hand():
    g = np.random.RandomState(0)
    unit = lambda o: o/np.linalg.norm(o, axis=1, keepdims=True)
    x,q,y,z = unit(g.randn(40, 6)),unit(g.randn(1100, 6)),g.randint(0, 4, 40),g.randint(0, 4, 1100)
    votes = np.zeros((len(q), 4))
    for i,row in enumerate(q@x.T):
        for j in np.argsort(-row)[:5]: votes[i,y[j]] += np.exp(row[j]/.07)
    assert knn_accuracy((torch.tensor(x).float(),torch.tensor(y)), (torch.tensor(q).float(),torch.tensor(z)), k=5)==pytest.approx((votes.argmax(1)==z).mean(), abs=2e-3)

@pytest.mark.parametrize('linear', [False,True])
def test_a_probe_changes_nothing(linear, trained, quiet):
    "The same weights with it and without it; a column of its own before those of the terms"
    labelled = few_digits(20, per_class=4)
    def fit(cbs):
        set_seed(0)
        learn = distill_learner(few_digits(20, per_class=4), trained, wrn(10, 1), cbs=[Similarity(), *cbs], metrics=accuracy, precision='float32')
        return quiet(learn, 2, 1e-3)
    plain,probed = fit([]),fit([Probe(labelled, linear=linear)])
    name = 'linear' if linear else 'knn'
    assert all(torch.equal(a, b) for a,b in zip(plain.student.state_dict().values(), probed.student.state_dict().values()))
    assert [*probed.recorder.history]==['train_loss','valid_loss','accuracy',name,'similarity'] and probed.recorder.history[name].between(0, 1).all()

@pytest.mark.parametrize('make', students.values(), ids=[*students])
def test_features_of_any_student(make):
    x,y = features_of(make(), image_dls().valid)
    assert len(x)==len(y)==8 and x.ndim==2 and torch.allclose(x.norm(dim=1), torch.ones(8), atol=1e-4)

def test_a_probe_draws_nothing_when_it_is_made():
    labelled = few_digits(20, per_class=4)
    before = torch.get_rng_state(),random.getstate()
    Probe(labelled)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate()==before[1]

def test_a_probe_needs_labels():
    with pytest.raises(ValueError, match='DataLoaders with labels'): Probe(image_dls(labelled=False))

# From a distilled student to a classifier

@pytest.mark.parametrize('make', [*students.values(), lambda: timm.create_model('mobilenetv3_small_050', num_classes=0), lambda: nn.Sequential(*list(resnet(10, width=.25).children())[:-3])],
    ids=[*students,'headless','maps'])
def test_a_classifier_begins_with_the_student(make, quiet):
    "The body's values, in its own group, frozen at first; the student itself stays as it is"
    student = make()
    before = deepcopy(student.state_dict())
    learn = classifier_learner(image_dls(c=3), student, train_bn=False)
    body,head = learn.splitter(learn.model)
    assert learn.model.eval()(torch.zeros(2,3,64,64)).shape==(2,3) and [p.shape[0] for p in head]==[3,3]
    assert len(body)+len(head)==len([*learn.model.parameters()])
    held = [p.clone() for p in body]
    learn.freeze()
    quiet(learn, 1, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(held, body))
    assert all(torch.equal(v, before[k]) for k,v in student.state_dict().items())

def test_the_head_is_the_layer_that_runs_last():
    "Whatever stands last in the network"
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head,self.body,self.unused = nn.Linear(8, 10),ConvLayer(3, 8, stride=2),nn.Linear(8, 5)
        def forward(self, x): return self.head(self.body(x).mean((2,3)))
    learn = classifier_learner(image_dls(c=3), HeadFirst())
    assert [p.shape[0] for p in learn.splitter(learn.model)[1]]==[3,3]

@pytest.mark.parametrize('width', [.25,1.])
def test_vkds_projection_stays_orthogonal(width, quiet):
    "To more dimensions and to fewer, under weight decay"
    learn = distill_learner(image_dls(), resnet(10, width=.5), resnet(10, width=width), cbs=VkD(), precision='float32')
    quiet(learn, 5, 1e-2, wd=.1)
    w = first(learn.vkd.adapters.values()).linear.weight
    w = w.T@w if w.shape[0]>w.shape[1] else w@w.T
    torch.testing.assert_close(w, torch.eye(len(w)), rtol=0, atol=1e-4)

def test_no_way_to_pair_lists_the_layers_of_both():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 10))
    with pytest.raises(ValueError, match='the teacher has no convolutional stages') as e: distill_learner(image_dls(), flat, wrn(10, 1), cbs=FitNet(), loss_func=CrossEntropyLossFlat())
    told = str(e.value)
    assert '(layers of the student: stem 16×64×64, ' in told and 'group3 64×16×16' in told and 'of the teacher: 0 12288, 1 10)' in told

def test_agreement_reads_the_outputs_that_are_the_students_classes(trained):
    wide,dls = nn.Sequential(deepcopy(trained), nn.Linear(10, 20)),few_digits()
    wide[1].weight.data,wide[1].bias.data = torch.zeros(20, 10),torch.full((20,), -50.)
    for i in range(10): wide[1].weight.data[19-2*i,i],wide[1].bias.data[19-2*i] = 1.,0.
    wide[1].bias.data[0] = 99.  # an output that is no class of the student's
    learn = distill_learner(dls, wide, wrn(10, 1), teacher_vocab=[19-2*i for i in range(10)])
    assert agreement(learn).overall.accuracy.teacher==pytest.approx(accuracy_of(trained, dls))
    with pytest.raises(ValueError, match='20 outputs of the teacher, 10 outputs of the student'): agreement(distill_learner(dls, wide, wrn(10, 1), cbs=FitNet()))
