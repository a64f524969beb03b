"A cached fit is the fit without a cache, or is refused"
import errno, json, shutil, pytest, timm
from conftest import few_digits, n_hooks, slow_but
from fastai.vision.all import *
from kdfast.all import *
from kdfast.losses.core import hint_loss

class Live(TeacherCache):
    "The views of a cache, with the teacher asked about each"
    recall = None

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.student.parameters()])

def far(a, b): return ((a-b).norm()/b.norm()).item()

def apart(a, b):
    "How far from each other two learners are, as a part of the way that they have come from the same start"
    set_seed(0)
    start = torch.cat([p.detach().flatten() for p in wrn(10, 1).parameters()])
    return far(weights(a)-start, weights(b)-start)

def fit(teacher, *cbs, dls=None, terms=(KD,AT), pad=0, epochs=3, precision='float32', **kwargs):
    set_seed(0)
    student,dls = wrn(10, 1),dls or few_digits(pad=pad)
    learn = distill_learner(dls, teacher, student, cbs=[*(t() for t in terms), *cbs], precision=precision, opt_func=SGD, **kwargs)
    dls.train.rng.seed(0)
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
    return learn

def counted(net):
    calls = []
    net.register_forward_hook(lambda m,i,o: calls.append(len(i[0])) if len(i[0])>2 else None)
    return calls

@pytest.fixture
def moved(trained):
    "A teacher that says something"
    return deepcopy(trained)

@pytest.fixture
def exact(monkeypatch):
    "Keep answers in float32, so that nothing is left to rounding"
    half = TeacherCache._arrays
    monkeypatch.setattr(TeacherCache, '_arrays', lambda *a: {k:(shape, 'float32' if dtype=='float16' else dtype) for k,(shape,dtype) in half(*a).items()})

@pytest.mark.parametrize('terms', [(KD,), (AT,), (KD,AT), (KD,AT,FitNet), (partial(FeatureKD, hint_loss, {'fc':'fc'}),)], ids=['KD','AT','KD+AT','KD+AT+FitNet','FeatureKD'])
@pytest.mark.parametrize('views', slow_but(2, of=[0,2]))
def test_a_cached_fit_is_the_fit_without(terms, views, moved, tmp_path, exact):
    "Shuffled, with augmentation where there are views"
    calls,pad = counted(moved.stem),4*bool(views)
    cached = fit(moved, TeacherCache(tmp_path/'c', views), terms=terms, pad=pad)
    n = len(calls)
    again = fit(moved, TeacherCache(tmp_path/'c', views), terms=terms, pad=pad)
    assert n==4*max(1, views)==len(calls)
    plain = fit(moved, *([Live(tmp_path/'c', views)] if views else []), terms=terms, pad=pad)
    assert torch.equal(weights(cached), weights(again))
    assert apart(cached, plain)<1e-5 and apart(cached, fit(None, terms=()))>.5
    assert cached.recorder.history.values==pytest.approx(plain.recorder.history.values, rel=1e-4)

@pytest.mark.parametrize('terms', [(KD,), (KD,AT)], ids=['KD','KD+AT'])
def test_half_precision_rounds(terms, moved, tmp_path):
    cached,plain = fit(moved, TeacherCache(tmp_path/'c'), terms=terms),fit(moved, terms=terms)
    assert 0<apart(cached, plain)<.2 and cached.recorder.history.values[0]==pytest.approx(plain.recorder.history.values[0], rel=1e-2, abs=1e-3)

def test_views_are_pixel_by_pixel_what_the_teacher_saw(moved, tmp_path):
    "Found in the first epochs, met again in later ones in another order"
    seen = {}
    class See(Callback):
        order,run_valid = 100,False
        def after_pred(self):
            for x,y,t in zip(self.x, self.y, self.learn.teacher.out): seen.setdefault((self.epoch%3, x.sum().item()), []).append((x.clone(), y.item(), t.clone()))
    fit(moved, TeacherCache(tmp_path/'c', 3), See(), pad=4, epochs=6)
    assert len(seen)==3*80 and all(len(v)==2 for v in seen.values())
    for a,b in seen.values(): assert torch.equal(a[0], b[0]) and a[1]==b[1] and torch.equal(a[2], b[2])
    x,t = torch.stack([v[0][0] for v in seen.values()]),torch.stack([v[0][2] for v in seen.values()])
    with torch.no_grad(): assert far(t, moved.eval()(x.as_subclass(Tensor)))<1e-3

@pytest.fixture
def files(tmp_path):
    "A folder of images, loaded by worker processes"
    raw = few_digits(1, per_class=9).train
    for part,keep in (('train',range(8)),('test',range(8, 9))):
        for i,(x,y) in enumerate(raw.dataset):
            if i%9 in keep:
                dest = tmp_path/part/str(int(y))
                dest.mkdir(parents=True, exist_ok=True)
                to_image(x).save(dest/f'{i}.png')
    return tmp_path

def file_dls(path, item_tfms=None, batch_tfms=None):
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter('train', 'test'), get_y=parent_label, item_tfms=item_tfms, batch_tfms=batch_tfms)
    return block.dataloaders(path, bs=20, num_workers=2, device='cpu')

def test_files_loaded_by_workers(moved, files, exact):
    cached = fit(moved, TeacherCache(files/'c'), dls=file_dls(files))
    assert apart(cached, fit(moved, dls=file_dls(files)))<1e-5

@pytest.mark.slow
@pytest.mark.parametrize('item,batch', [(RandomResizedCrop(32, min_scale=.5),None), (None,aug_transforms())], ids=['item','batch'])
def test_fastai_augmentation(item, batch, moved, files, exact):
    "Refused without views, which keep whatever it does"
    with pytest.raises(ValueError, match=r'views=4'): fit(moved, TeacherCache(files/'c'), dls=file_dls(files, item, batch))
    assert not (files/'c').exists()
    cached = fit(moved, TeacherCache(files/'c', 2), dls=file_dls(files, item, batch))
    assert apart(cached, fit(moved, Live(files/'c', 2), dls=file_dls(files, item, batch)))<1e-5

@pytest.mark.parametrize('cb', [MixUp,CutMix,partial(Callback, before_batch=lambda cb: setattr(cb.learn, 'xb', (cb.xb[0].flip(-1),)))], ids=['MixUp','CutMix','a flip'])
@pytest.mark.parametrize('views', [0,2])
def test_other_images_are_refused(cb, views, moved, tmp_path):
    with pytest.raises(ValueError, match='images differ from those in the cache'): fit(moved, TeacherCache(tmp_path/'c', views), cb())

def test_a_wrong_order_is_refused(moved, tmp_path):
    "A loader that does not keep to the numbers that it gives out"
    dls = few_digits(pad=0)
    fit(moved, TeacherCache(tmp_path/'c'), dls=dls)
    class Turn(Callback):
        order = 100
        def before_train(self):
            create = self.dls.train.create_batches
            self.dls.train.create_batches = lambda samps: create([*samps][::-1])
    with pytest.raises(ValueError, match='images differ'): fit(moved, TeacherCache(tmp_path/'c'), Turn(), dls=dls)

def other_tfms(): return few_digits(pad=3)

@pytest.mark.parametrize('change,match', [('teacher','another teacher'), ('data','another data set'), ('labels','another data set'), ('stats','another data set'), ('pipeline','another data set'), ('views','views=2, not 3'), ('terms','lacks DistillCallback.compact')])
def test_another_cache_is_refused(change, match, moved, tmp_path):
    fit(moved, TeacherCache(tmp_path/'c', 2), pad=4)
    with torch.no_grad():
        if change=='teacher': moved.fc.bias[0] += .01
    dls = few_digits(seed=int(change=='data'), pad=3 if change=='pipeline' else 4)
    if change=='labels': dls.train_ds.tls[1].tfms.fs[0].labels[5] = '9' if dls.train_ds.tls[1].tfms.fs[0].labels[5]!='9' else '8'
    if change=='stats': dls.train.after_batch.fs[-1].mean += .01
    before = {f.name:f.read_bytes() for f in (tmp_path/'c').iterdir()}
    with pytest.raises(ValueError, match=match) as e: fit(moved, TeacherCache(tmp_path/'c', 3 if change=='views' else 2), dls=dls, terms=(KD,FitNet) if change=='terms' else (KD,AT))
    assert str(tmp_path/'c') in str(e.value) and before=={f.name:f.read_bytes() for f in (tmp_path/'c').iterdir()}

@pytest.mark.parametrize('damage', ['cut','gone','header','meta','file'])
def test_a_damaged_cache(damage, moved, tmp_path):
    path = tmp_path/'c'
    fit(moved, TeacherCache(path))
    f = path/'1.npy'
    if damage=='cut': f.write_bytes(f.read_bytes()[:-100])
    if damage=='gone': f.unlink()
    if damage=='header': f.write_bytes(b'')
    if damage=='meta': (path/'meta.json').write_text('{"views')
    if damage=='file':
        shutil.rmtree(path)
        path.write_text('hello')
    with pytest.raises(ValueError, match='is not a cache, or is damaged') as e: fit(moved, TeacherCache(path))
    assert 'delete' in str(e.value)

def test_no_room(moved, tmp_path, monkeypatch):
    "Before anything is written, and while it is"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=1000))
    with pytest.raises(OSError, match='does not fit on the disk'): fit(moved, TeacherCache(tmp_path/'c'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage)
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='No space left'): fit(moved, TeacherCache(tmp_path/'c'))
    assert {f.name for f in tmp_path.iterdir()}<={'c.lock'}

@pytest.mark.parametrize('error', [KeyboardInterrupt,RuntimeError])
def test_an_interrupt_while_it_is_made(error, moved, tmp_path, capsys):
    calls = []
    def stop(m, i, o):
        calls.append(len(i[0]))
        if calls.count(20)==2: raise error('stop')
    handle = moved.stem.register_forward_hook(stop)
    with pytest.raises(error): fit(moved, TeacherCache(tmp_path/'c', 2), pad=4)
    assert ('was not created: the next fit runs the teacher from the beginning' in capsys.readouterr().err)==(error is KeyboardInterrupt)
    handle.remove()
    assert {f.name for f in tmp_path.iterdir()}<={'c.lock'} and n_hooks(moved)==0
    assert apart(fit(moved, TeacherCache(tmp_path/'c', 2), pad=4), fit(moved, Live(tmp_path/'c', 2), pad=4))<.2

def test_making_it_changes_no_random_number(moved, tmp_path):
    "The batches of a first fit are those of a second"
    sums = lambda learn: learn.recorder.history.values.tolist()
    assert sums(fit(moved, TeacherCache(tmp_path/'c')))==sums(fit(moved, TeacherCache(tmp_path/'c')))

def test_what_is_misused(moved, tmp_path):
    for views in (-1,1.5,'2'):
        with pytest.raises(ValueError, match='whole number'): TeacherCache(tmp_path/'c', views)
    with pytest.raises(ValueError, match='TeacherCache has no teacher'): fit(None, TeacherCache(tmp_path/'c'), terms=())
    broken = deepcopy(moved)
    nn.init.constant_(broken.fc.bias, 1e6)
    with pytest.raises(ValueError, match='exceed half precision'): fit(broken, TeacherCache(tmp_path/'c'))
    assert not (tmp_path/'c').exists()

def test_validation_export_and_lr_find(moved, tmp_path):
    learn = fit(moved, TeacherCache(tmp_path/'c', 2), pad=4, path=tmp_path)
    assert len(learn.validate())==1 and learn.get_preds()[0].shape[1]==10
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False)
    learn.export()
    back = load_learner(tmp_path/'export.pkl')
    assert back.teacher_cache.files is None and (tmp_path/'export.pkl').stat().st_size<1e6

def test_blocks_ask_the_teacher_themselves(moved, tmp_path, quiet):
    learn = distill_learner(few_digits(pad=4), moved, wrn(10, 1), cbs=[KD(), TeacherCache(tmp_path/'c', 2)])
    quiet(learn, 1, head=1, how='fit_blocks')
    assert json.loads((tmp_path/'c'/'meta.json').read_text())['views']==2

def test_half_the_precision_and_accumulation(moved, tmp_path):
    a,b = (fit(moved, GradientAccumulation(40), *o, precision='auto') for o in ((TeacherCache(tmp_path/'c'),), ()))
    assert apart(a, b)<.2

# What a review found

def test_targets_keep_their_numbers(moved, tmp_path):
    "Of a regression, beyond what half precision holds"
    x,y = torch.randn(40, 3, 8, 8),torch.linspace(1e4, 1e6, 40)
    dls = Datasets([*range(40)], [[x.__getitem__], [y.__getitem__]]).dataloaders(bs=8, num_workers=0, device='cpu')
    seen,net = set(),lambda: nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), fc=nn.Linear(144, 1)))
    class See(Callback):
        run_valid = False
        def after_pred(self): seen.update(self.y.tolist())
    learn = distill_learner(dls, net(), net(), cbs=[AT({'a':'a'}), TeacherCache(tmp_path/'c', 2), See()], loss_func=MSELossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-9)
    assert seen<={*y.tolist()} and len(seen)==len(dls.train)*8

def test_views_go_on_in_the_next_fit(moved, tmp_path):
    views = []
    class See(Callback):
        order,run_valid = 100,False
        def before_train(self): views.append(self.dl.view)
    learn = fit(moved, TeacherCache(tmp_path/'c', 3), See(), pad=4, epochs=2)
    with learn.no_bar(), learn.no_logging():
        for _ in range(3): learn.fit(1, 1e-3)
    assert views==[0,1,2,0,1]

@pytest.mark.parametrize('precision,match', [(None,'changes during training'), ('auto','in precision')])
def test_precision_of_a_cache(precision, match, moved, tmp_path):
    fit(moved, TeacherCache(tmp_path/'c'))
    with pytest.raises(ValueError, match=match): fit(moved, TeacherCache(tmp_path/'c'), precision=precision)

def test_a_teacher_that_sees_otherwise(moved, tmp_path):
    "Two functions of one name"
    def arm(k):
        dls = few_digits(pad=0)
        learn = Learner(dls, wrn(10, 1), cbs=[TeacherCallback(moved, lambda x: x*k), KD(), TeacherCache(tmp_path/'c')])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    arm(1.)
    arm(1.)
    with pytest.raises(ValueError, match='transforms images differently'): arm(2.)

def test_labels_in_a_table(moved, files):
    "Another label in the data frame from which they come"
    frame = pd.DataFrame(dict(name=[str(o) for o in get_image_files(files)], label=[o.parent.name for o in get_image_files(files)]))
    make = lambda df: ImageDataLoaders.from_df(df, path='/', fn_col=0, label_col=1, valid_pct=.1, seed=0, bs=20, num_workers=0, device='cpu')
    fit(moved, TeacherCache(files/'c', 1), dls=make(frame))
    other = frame.copy()
    other.loc[:60,'label'] = '3'
    with pytest.raises(ValueError, match='another data set'): fit(moved, TeacherCache(files/'c', 1), dls=make(other))

def test_a_loader_that_does_not_tell_its_samples(moved, tmp_path):
    data = [(torch.randn(3,32,32), i%10) for i in range(40)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)))
    dls.c = 10
    learn = distill_learner(dls, moved, wrn(10, 1), cbs=[KD(), TeacherCache(tmp_path/'c')], loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match="which samples are in a batch"), learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_blocks_without_terms(moved, tmp_path, quiet):
    learn = distill_learner(few_digits(), moved, wrn(10, 1), cbs=TeacherCache(tmp_path/'c'))
    learn.remove_cb(KD)
    quiet(learn, 1, head=1, how='fit_blocks')
    assert not (tmp_path/'c').exists()

def test_another_batch_size_is_the_same_data(moved, tmp_path):
    fit(moved, TeacherCache(tmp_path/'c', 2), dls=few_digits())
    fit(moved, TeacherCache(tmp_path/'c', 2), dls=few_digits(10, per_class=8))

def test_after_a_refusal_the_next_fit_is_free(moved, tmp_path):
    learn = fit(moved, TeacherCache(tmp_path/'c'))
    with pytest.raises(ValueError, match='images differ'), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MixUp())
    learn.kd.weight = learn.at.weight = 0.
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

# Principal components, and a cache without its teacher

def test_components(moved, tmp_path, exact):
    "Nearly as many as there are channels lose nearly nothing; few take less room, and say how much they lose"
    fits,size = {n:fit(moved, TeacherCache(tmp_path/str(n), components=n), terms=(KD,Cosine), epochs=2) for n in (None,127)},{}
    with pytest.warns(UserWarning, match=r'2 components keep \d+% of the variance of DistillCallback.compact group'):
        fits[2] = fit(moved, TeacherCache(tmp_path/'2', components=2), terms=(KD,Cosine), epochs=2)
    near,less = (apart(fits[n], fits[None]) for n in (127,2))
    assert near<less/5
    for n in fits: size[n] = sum(f.stat().st_size for f in (tmp_path/str(n)).iterdir())
    assert size[2]<size[None]/8
    with pytest.raises(ValueError, match='components=2, not 3'): fit(moved, TeacherCache(tmp_path/'2', components=3), terms=(KD,Cosine))
    with pytest.raises(ValueError, match='at least 1'): TeacherCache(tmp_path/'c', components=0)

def test_components_are_those_of_numpy(moved, tmp_path, exact):
    "What is read again is the projection on the directions of most variance"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # there may be more to it than twelve
        fit(moved, TeacherCache(tmp_path/'c', components=12), terms=(FitNet,), epochs=1)
    with open(tmp_path/'c'/'meta.json') as f: files = json.load(f)['files']
    name = 'DistillCallback.compact group3'
    basis,kept = (np.load(tmp_path/'c'/files[k]) for k in (f'basis {name}',name))
    dls = few_digits(pad=0)
    x = dls.train.new(shuffle=False, drop_last=False).one_batch()[0]
    with Taps(moved, ['group3']) as taps, torch.no_grad():
        moved.eval()(x)
        maps = taps['group3'].movedim(1, -1).double().numpy()
    rows = maps.reshape(-1, maps.shape[-1])
    by_hand = (maps-basis[0])@basis[1:].T
    assert np.abs(kept[0,:len(x)].transpose(0,2,3,1)-by_hand).max()<1e-2*np.abs(by_hand).max()
    assert np.allclose(basis[1:]@basis[1:].T, np.eye(12), atol=1e-4)

@pytest.mark.parametrize('views', [0,2])
def test_without_its_teacher(views, moved, tmp_path, exact):
    "Someone else trains the same student, or another, from the folder alone"
    pad = 4*bool(views)
    first = fit(moved, TeacherCache(tmp_path/'c', views), terms=(KD,AT,FitNet), pad=pad)
    shutil.move(tmp_path/'c', tmp_path/'handed')
    learn = fit(TeacherCache(tmp_path/'handed'), terms=(KD,AT,FitNet), pad=pad)
    assert torch.equal(weights(first), weights(learn))
    assert 'outputs read from a cache' in str(learn.show_distill()) and f"for a Sequential, whose outputs are in {tmp_path/'handed'}" in str(learn.show_distill())
    learn.show_pairs()
    dls = few_digits(pad=pad)
    other = distill_learner(dls, TeacherCache(tmp_path/'handed'), resnet(10, width=.25, stem='small'))
    with other.no_bar(), other.no_logging(): other.fit(1, 1e-3)
    assert [c.name for c in other.cbs if isinstance(c, DistillCallback)]==['kd'] and other.recorder.history.kd[0]>0

def test_only_a_record_is_left(moved, tmp_path):
    "What is not kept, or is asked of the teacher itself, is an error that says so"
    fit(moved, TeacherCache(tmp_path/'c'), terms=(AT,))
    handed = lambda: TeacherCache(tmp_path/'c')
    with pytest.raises(ValueError, match='lacks logits'): fit(handed(), terms=(KD,))
    with pytest.raises(ValueError, match='another data set'): fit(handed(), terms=(AT,), dls=few_digits(seed=1, pad=0))
    learn = distill_learner(few_digits(pad=0), handed(), wrn(10, 1), cbs=AT())
    learn.remove_cb(TeacherCache)
    with pytest.raises(ValueError, match='exists only in a cache'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn = distill_learner(few_digits(pad=0), handed(), wrn(10, 1), cbs=AT())
    shutil.rmtree(tmp_path/'c')
    with pytest.raises(ValueError, match='is gone'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    with pytest.raises(ValueError, match='is not a cache'): distill_learner(few_digits(), handed(), wrn(10, 1), cbs=AT())
    assert not (tmp_path/'c').exists()

def test_tokens_without_their_teacher(tmp_path, quiet):
    "A transformer without a head, its tokens as components, teaches another student through the default term"
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, num_classes=0)
    def features(teacher, *cbs):
        set_seed(0)
        dls = few_digits(pad=0)
        dls.train.rng.seed(0)
        return quiet(distill_learner(dls, teacher, resnet(10, width=.25, stem='small'), cbs=[*cbs], precision='float32'), 1, 1e-3)
    plain,first = features(vit),features(vit, TeacherCache(tmp_path/'c', components=64))
    handed = features(TeacherCache(tmp_path/'c'))
    assert [*first.fitnet.layers.items()]==[*handed.fitnet.layers.items()]
    values = [o.recorder.history.fitnet[0] for o in (plain,first,handed)]
    assert values[1]==pytest.approx(values[2], rel=1e-6) and values[0]==pytest.approx(values[1], rel=.1)
