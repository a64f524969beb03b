"Data from files, archives and a server; in memory the same, and faster"
import functools, http.server, itertools, shutil, subprocess, tarfile, threading, pytest, warm
from time import perf_counter
from fastai.vision.all import *
from kdfast.all import *
from kdfast.data.memory import open_image

def fill(root, parts, n=12, size=32, classes='369'):
    "A data set of digits as files"
    dls = digits_dls()
    x,y = dls.train_ds.tls[0].tfms.fs[0].images,dls.train_ds.tls[1].tfms.fs[0].labels
    for part in parts:
        for c in classes:
            (root/part/c).mkdir(parents=True)
            for i in [i for i,o in enumerate(y) if o==c][:n]:
                Image.fromarray(x[i].permute(1,2,0).numpy()).resize((size,size)).save(root/part/c/f'{i}.png')
    return root

@pytest.fixture
def cifar(tmp_path): return fill(tmp_path/'cifar10', ('train','test'))

@pytest.fixture
def imagenette(tmp_path): return fill(tmp_path/'imagenette2-160', ('train','val'), size=48)

@pytest.fixture
def home(tmp_path, monkeypatch):
    "Where archives are unpacked"
    folder = tmp_path/'home/data'
    folder.mkdir(parents=True)
    monkeypatch.setattr('kdfast.data.files.fastai_path', lambda kind: folder)
    return folder

def test_download_from_a_server(cifar, tmp_path):
    "`path=None` is fastai's untar_data, here from an archive server on this machine; CIFAR-100 has its classes in superclasses"
    for part in ('train','test'):
        for c,kind in (('3','odd'),('6','even'),('9','odd')): shutil.copytree(cifar/part/c, tmp_path/'cifar100'/part/kind/c)
    for root in (cifar,tmp_path/'cifar100'):
        made = Path(shutil.make_archive(str(tmp_path/'www'/root.name), 'gztar', root.parent, root.name))
        made.rename(tmp_path/f'www/{root.name}.tgz')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path/'www')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    code = ("from fastai.vision.all import *; from kdfast.all import *; "
        f"URLs.CIFAR,URLs.CIFAR_100 = '{url}/cifar10.tgz','{url}/cifar100.tgz'; "
        "dls = [f(bs=4, num_workers=0) for f in (cifar10_dls,cifar100_dls)]; print(*(len(d.train_ds) for d in dls), dls[1].vocab)")
    try: res = subprocess.run(warm.command('-c', code), capture_output=True, text=True, timeout=120, env={**os.environ, 'FASTAI_HOME':str(tmp_path/'home')})
    finally: server.shutdown()
    assert res.returncode==0, res.stderr
    assert res.stdout.strip().endswith("36 36 ['3', '6', '9']")
    assert (tmp_path/'home/data/cifar10/train/3').is_dir() and (tmp_path/'home/data/cifar100/train/odd/9').is_dir()

@pytest.mark.parametrize('kind,ext', [('gztar','tgz'), ('xztar','tar.xz')])
def test_archives(kind, ext, imagenette, tmp_path, home):
    made = Path(shutil.make_archive(str(tmp_path/'a'), kind, imagenette.parent, imagenette.name))
    made = made.rename(tmp_path/f'set.{ext}')
    dls = imagenette_dls(made, size=32, bs=4, num_workers=0)
    assert (len(dls.train_ds),len(dls.valid_ds))==(36,36) and dls.one_batch()[0].shape==(4,3,32,32)

def test_a_broken_archive_leaves_nothing(tmp_path, home):
    for name,content in (('a.tgz', b'\x1f\x8bnothing'), ('b.zip', b'no'), ('c.txt', b'no')):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match='cannot be unpacked'): cifar10_dls(tmp_path/name)
        assert not [*home.iterdir()]

def packed(folder, file, mode='w:gz'):
    with tarfile.open(file, mode) as f: f.add(folder, folder.name)
    return file

def shown(path): return imagenette_dls(path, size=32, bs=36, in_memory=True).valid_ds.tls[0].tfms.fs[0].images

def test_other_content_under_the_same_name_and_size(imagenette, tmp_path, home):
    file = packed(imagenette, tmp_path/'set.tar', 'w')
    size,before = file.stat().st_size,shown(file)
    for o in imagenette.rglob('*.png'):
        n = o.stat().st_size
        Image.new('RGB', (48,48), (200,10,10)).save(o)
        o.write_bytes(o.read_bytes().ljust(n, b'\0'))
    packed(imagenette, file, 'w')
    assert file.stat().st_size==size and not torch.equal(shown(file), before)

@pytest.mark.parametrize('mode,name', [('w:gz','set.tgz'), ('w:xz','set.tar.xz'), ('w:bz2','set.tar.bz2')])
def test_a_flipped_bit_is_no_other_image(mode, name, imagenette, tmp_path, home):
    file = packed(imagenette, tmp_path/name, mode)
    right,content,refused = shown(file),file.read_bytes(),0
    for i in range(12):
        at = len(content)*(2*i+1)//24
        file.write_bytes(content[:at]+bytes([content[at]^(1<<i%8)])+content[at+1:])
        try: assert torch.equal(shown(file), right)
        except ValueError as e: refused += 'cannot be unpacked' in str(e)
    assert refused>=8 and len([*home.iterdir()])<=13-refused

def test_an_archive_that_was_cut_is_no_smaller_data_set(imagenette, tmp_path, home):
    "Wherever it was cut, between two files as well"
    file = packed(imagenette, tmp_path/'set.tar', 'w')
    with tarfile.open(file) as f: ends = [o.offset for o in f.getmembers()][-3:]
    content = file.read_bytes()
    for at in (*ends, ends[0]+100, ends[-1]+1000):
        file.write_bytes(content[:at])
        with pytest.raises(ValueError, match='cannot be unpacked'): shown(file)
    assert not [*home.iterdir()]

def test_an_archive_of_something_else_leaves_nothing(cifar, tmp_path, home):
    with pytest.raises(ValueError, match='must hold the folders train and val'): shown(packed(cifar, tmp_path/'set.tgz'))
    assert not [*home.iterdir()]

def test_hidden_folders_are_no_classes(imagenette):
    classes = [*imagenette_dls(imagenette, size=32, bs=4, num_workers=0).vocab]
    for o,part in itertools.product(('.ipynb_checkpoints','@eaDir'), ('train','val')): shutil.copytree(imagenette/part/classes[0], imagenette/part/o)
    assert [*imagenette_dls(imagenette, size=32, bs=4, num_workers=0).vocab]==classes
    thumbnail = imagenette/'train'/classes[0]/'@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg'
    thumbnail.parent.mkdir(parents=True)
    shutil.copy(first((imagenette/'train'/classes[0]).glob('*.png')), thumbnail)
    assert len(imagenette_dls(imagenette, size=32, bs=4, num_workers=0).train_ds)==36

def test_one_class_is_refused_one_image_of_each_and_any_name_are_not(tmp_path):
    root = fill(tmp_path/'set', ('train','val'), n=1, classes='36')
    for part in ('train','val'): (root/part/'3').rename(root/part/'the\n3')
    dls = imagenette_dls(root, size=32, bs=2, num_workers=0)
    assert [*dls.vocab]==['6','the\n3'] and len(dls.train_ds)==2 and len(dls.train.one_batch()[0])==2
    for part in ('train','val'): shutil.rmtree(root/part/'6')
    with pytest.raises(ValueError, match='set has one class, the'): imagenette_dls(root, size=32)

def test_grey_images_of_16_bits(imagenette):
    "As those of 8 bits, in memory and from files; what cannot be told is refused"
    ramp = np.linspace(0, 2**16-1, 48*48).reshape(48, 48)
    sixteen,eight,*_ = sorted((imagenette/'val').rglob('*.png'))
    Image.fromarray(ramp.astype(np.uint16)).save(sixteen)
    Image.fromarray((ramp/257).round().astype(np.uint8)).save(eight)
    x,y = (np.asarray(open_image(o)) for o in (sixteen,eight))
    assert x.shape==(48,48,3) and np.abs(x.astype(int)-y).max()<=1 and 100<x.mean()<155
    Image.fromarray(ramp.astype(np.float32)).save(sixteen.with_suffix('.tiff'))
    with pytest.raises(ValueError, match='floating point'): open_image(sixteen.with_suffix('.tiff'))
    with pytest.raises(ValueError, match='more than 16 bits'): open_image(np.full((4,4), 2**20, dtype=np.int32))

def test_folders_that_are_no_data_set(cifar, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): imagenette_dls(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='must hold the folders train and val'): imagenette_dls(cifar)
    shutil.rmtree(cifar/'test/9')
    with pytest.raises(ValueError, match=r"differ, \['9'\]"): cifar10_dls(cifar)
    (cifar/'test/9').mkdir()
    with pytest.raises(ValueError, match='no images of 9'): cifar10_dls(cifar)
    for c in '369': shutil.rmtree(cifar/'train'/c)
    with pytest.raises(ValueError, match='no images of any class'): cifar10_dls(cifar)

@pytest.mark.parametrize('in_memory', [False,True])
def test_cifar_100_is_read_with_and_without_superclasses(in_memory, cifar, tmp_path, home):
    "The same images, classes and parts, whether classes stand in folders of superclasses or not; an archive too"
    nested = tmp_path/'cifar100'
    for part in ('train','test'):
        for c,kind in (('3','b'),('6','a'),('9','b')): shutil.copytree(cifar/part/c, nested/part/kind/c)
    archive = shutil.make_archive(str(tmp_path/'packed'), 'xztar', nested)
    one,*others = (cifar100_dls(o, bs=9, pct=.5, in_memory=in_memory, num_workers=0) for o in (cifar,nested,archive))
    for o in others:
        assert list(o.vocab)==list(one.vocab)==['3','6','9'] and len(o.train_ds)==len(one.train_ds)==18
        of_class = lambda d,c: torch.cat([x[y==c] for x,y in d.valid]).sum((1,2,3)).sort().values
        assert all(torch.equal(of_class(o, c), of_class(one, c)) for c in range(3))
    shutil.rmtree(nested/'test/b/9')
    with pytest.raises(ValueError, match=r"differ, \['9'\]"): cifar100_dls(nested, in_memory=in_memory)

@pytest.mark.parametrize('in_memory', [False,True])
def test_a_corrupt_image_is_named(in_memory, cifar):
    bad = next((cifar/'train/6').iterdir())
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=f'^[^\n]*{bad.name} is not a readable image[^\n]*$'):  # without the traceback of a worker
        for _ in cifar10_dls(cifar, bs=36, in_memory=in_memory, num_workers=2).train: pass

@pytest.mark.parametrize('make,root', [(cifar10_dls,'cifar'), (partial(imagenette_dls, size=32),'imagenette')])
def test_in_memory_is_the_same_data(make, root, request):
    root = request.getfixturevalue(root)
    files,memory = (make(root, bs=8, in_memory=o, num_workers=0) for o in (False,True))
    assert list(files.vocab)==list(memory.vocab) and len(files.train_ds)==len(memory.train_ds)
    for (xa,ya),(xb,yb) in zip(files.valid, memory.valid):
        assert torch.equal(ya, yb) and torch.allclose(xa, xb, atol=2e-2)
    (xa,_),(xb,_) = files.train.one_batch(),memory.train.one_batch()
    assert xa.shape==xb.shape and xa.dtype==xb.dtype and abs(xa.std()-xb.std())<.2
    image = next((root/'train/3').iterdir())
    learns = [Learner(d, wrn(10, 1, n_out=3), path=root) for d in (files,memory)]
    learns[1].model.load_state_dict(learns[0].model.state_dict())
    with learns[0].no_bar(), learns[1].no_bar(): a,b = (l.predict(image)[2] for l in learns)
    assert torch.allclose(a, b, atol=2e-2)
    memory.show_batch()
    learns[1].export()
    assert (root/'export.pkl').stat().st_size < 500_000
    with load_learner(root/'export.pkl').no_bar() as l: assert torch.allclose(l.predict(image)[2], b, atol=1e-4)

def test_parts_are_the_same_everywhere(cifar):
    "The same seed picks the same files, in another folder too"
    names = lambda *args, **kwargs: {o.name for o in cifar10_dls(*args, bs=4, pct=.5, num_workers=0, **kwargs).train_ds.items}
    one = names(cifar)
    moved = cifar.rename(cifar.parent/'elsewhere')
    assert one==names(moved) and len(one)==18
    assert one!=names(moved, seed=1)

def test_parts_of_imagenette(tmp_path):
    "Stratified, in memory the same as from files, and the larger part has the smaller in it"
    root = fill(tmp_path/'imagenette2', ('train','val'), n=10, classes='36', size=40)
    def part(pct, **kwargs): return imagenette_dls(root, size=32, bs=2, pct=pct, num_workers=0, **kwargs).train_ds
    parts = [{o for o in part(pct).items} for pct in (.1,.2,.3,.4)]
    for pct,o in zip((.1,.2,.3,.4), parts): assert [sum(f.parent.name==c for f in o) for c in '36']==[10*pct]*2
    assert all(a<b for a,b in zip(parts, parts[1:]))
    assert parts[1]=={o for o in part(.2).items}!={o for o in part(.2, seed=1).items}
    assert len(part(.2, in_memory=True))==4

def test_cutmix_does_not_write_into_the_data():
    dls = digits_dls(20, per_class=8, pad=0, size=16, valid=60)
    images = dls.train_ds.tls[0].tfms.fs[0].images
    before = images.clone()
    learn = Learner(dls, wrn(10, 1), cbs=CutMix())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.equal(images, before)

@pytest.mark.slow
def test_accuracy_in_memory_is_that_from_files(tmp_path):
    "Both paths, one recipe: accuracies differ by less than the seeds do"
    root = fill(tmp_path/'d', ('train','test'), n=100, size=16, classes='0123456789')
    def acc(in_memory, seed):
        set_seed(seed)
        learn = Learner(cifar10_dls(root, bs=50, in_memory=in_memory, num_workers=0), wrn(10, 1), metrics=accuracy)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        return learn.recorder.values[-1][-1]
    files,memory = ([acc(o, s) for s in range(2)] for o in (False,True))
    assert abs(np.mean(files)-np.mean(memory)) < .08 and min(files+memory)>.5

def test_the_loader_in_memory_is_fast(tmp_path):
    "benchmarks/loader.py sees over 30 times the rate of files with two workers; the machine that tests may be busy"
    root = fill(tmp_path/'d', ('train','test'), n=100, classes='0123456789')
    def rate(dl):
        start = perf_counter()
        n = sum(len(x) for x,_ in dl)
        return n/(perf_counter()-start)
    files,memory = (cifar10_dls(root, bs=100, in_memory=o, num_workers=0) for o in (False,True))
    images,labels = (tl.tfms.fs[0] for tl in memory.train_ds.tls)
    part = images.images,labels.labels
    many = tensor_dls(part, part, bs=100, tfms=[BatchShift(4), BatchFlip()], repeat=10)
    ratios = [rate(many.train)/rate(files.train) for _ in range(5)]
    assert np.median(ratios)>8, ratios

def test_channels_last_are_named():
    x = torch.zeros(4,32,32,3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r'Images of \(4, 32, 32, 3\) have 32 channels, stats 3: permute them'): tensor_dls((x,'abab'), (x,'abab'))

def test_labels_may_be_a_tensor():
    x,y = torch.randint(0, 255, (30,3,32,32), dtype=torch.uint8),torch.arange(30)%3
    for labels in (y, y.numpy()):
        dls = tensor_dls((x, labels), (x, labels), bs=8)
        assert dls.c==3 and dls.one_batch()[1].max()<3

def test_without_a_connection(monkeypatch):
    from urllib.error import URLError
    def offline(url): raise URLError('Name or service not known')
    monkeypatch.setattr('kdfast.data.files.untar_data', offline)
    with pytest.raises(OSError, match='imagenette2.* cannot be downloaded .Name or service not known.: pass path='): imagenette_dls(size=64)
