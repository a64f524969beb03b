"`kdfast distill` on any folder of images, and what is read from one"
import shutil, timm, torchvision, pytest
from conftest import slow_but
from dataclasses import replace
from urllib.error import URLError
from fastai.vision.all import *
from kdfast.all import *
from kdfast.cli import main
from kdfast.core import digest
from kdfast.data.folder import ImageFiles
from kdfast.experiments.records import read_results
from kdfast.experiments.results import arms_of, label_of, teachers_of
from kdfast.experiments.run import dls_of, images_in, Run

def paint(file, c, i, size=32):
    "An image whose class is the place of its bright stripe"
    x = np.random.default_rng(100*c+i).integers(0, 120, (size,size,3), dtype=np.uint8)
    x[:,8*c:8*c+8] += 120
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(file)

def classes(root, n=10, start=0, **kwargs):
    for c,name in enumerate(('cat','dog','emu')):
        for i in range(start, start+n): paint(root/name/f'{name}{i}.png', c, i, **kwargs)
    return root

def loose(root, n=30):
    for i in range(n): paint(root/f'{i}.png', i%3, i)
    return root

def table(root, valid=None, **more):
    "A CSV beside images whose folders are no classes"
    loose(root/'raw')
    rows = dict(file=[f'raw/{i}.png' for i in range(30)], label=[['cat','dog','emu'][i%3] for i in range(30)])
    pd.DataFrame({**rows, **(dict(valid=[valid[i>=24] for i in range(30)]) if valid else {}), **more}).to_csv(root/'pets.csv', index=False)
    return root/'pets.csv'

def split(root, valid='valid'):
    classes(root/'train', 8)
    classes(root/valid, 2, 8)
    return root

def with_test(root):
    classes(root/'train')
    classes(root/'test', 3, 10)
    return root

def one_below(root):
    classes(root/'images')
    return root

def packed(root): return Path(shutil.make_archive(str(root), 'gztar', split(root).parent, root.name)).rename(root.with_suffix('.tgz'))

layouts = dict(classes=classes, split=split, val=partial(split, valid='val'), test_is_left_alone=with_test, one_below=one_below, packed=packed,
    csv=table, csv_valid=partial(table, valid='01'), csv_words=partial(table, valid=('train','valid')))

@pytest.mark.parametrize('layout', layouts)
def test_layouts(layout, tmp_path, monkeypatch):
    "Thirty images of three classes, a fifth of each to validate with"
    monkeypatch.setattr('kdfast.data.files.fastai_path', lambda kind: tmp_path/'home')
    images = ImageFiles(layouts[layout](tmp_path/'pets'))
    assert images.name.startswith('pets-') and (len(images.train),len(images.valid))==(24,6)
    for fs,n in ((images.train,8),(images.valid,2)): assert Counter(images.labels[f] for f in fs)==dict.fromkeys(('cat','dog','emu'), n)
    assert not {*images.train} & {*images.valid} and re.search('30 images in 3 classes, the smallest ... with 10, the largest ... with 10; 24 to train on', images.survey())
    given = dict(split=8, val=8, packed=8, csv_valid=24, csv_words=24).get(layout)  # those that were named for it begin with this number
    if given: assert all(int(re.sub('[a-z]', '', f.stem))>=given for f in images.valid)

@pytest.mark.parametrize('make', [classes,table,loose])
def test_in_memory_and_from_files(make, tmp_path):
    "The same images and labels; without labels a batch has images alone, and one image can be predicted"
    path = make(tmp_path/'pets')
    files,memory = (folder_dls(path, size=32, bs=4, in_memory=o, num_workers=0) for o in (False,True))
    for a,b in zip(files.valid, memory.valid):
        assert len(a)==len(b)==(1 if make is loose else 2) and torch.allclose(a[0], b[0], atol=2e-2)
        if make is not loose: assert torch.equal(a[1], b[1])
    assert files.one_batch()[0].shape==memory.one_batch()[0].shape==(4,3,32,32)
    if make is loose: return
    assert [*files.vocab]==[*memory.vocab]==['cat','dog','emu']
    brightest = lambda x: x.mean(0)[:,:24].reshape(32,3,8).mean((0,2)).argmax().item()
    for dls in (files,memory): assert all(brightest(x)==y for xs,ys in dls.valid for x,y in zip(xs.as_subclass(Tensor), ys))
    learn = Learner(files, wrn(10, 1, n_out=3), path=tmp_path)
    learn.export()
    assert 'cat1' not in (tmp_path/'export.pkl').read_bytes().decode('latin1')
    with load_learner(tmp_path/'export.pkl').no_bar() as l: assert l.predict(get_image_files(tmp_path)[0])[0] in files.vocab

def test_parts_of_a_folder(tmp_path):
    path = classes(tmp_path/'pets')
    part = lambda **kwargs: {f.name for f in folder_dls(path, size=32, bs=2, num_workers=0, **kwargs).train_ds.items}
    assert len(part(pct=.5))==12 and len(part(per_class=1))==3 and part(pct=.5)!=part(pct=.5, seed=1) and part(per_class=1)<part(per_class=3)

def test_a_class_of_one_image_is_trained_on(tmp_path):
    paint(classes(tmp_path/'pets')/'yak/yak.png', 3, 0)
    images = ImageFiles(tmp_path/'pets')
    assert 'yak' in {images.labels[f] for f in images.train} and len(images.valid)==6 and 'the smallest yak with 1, the largest ' in repr(images)

def test_hidden_folders_are_no_classes_and_no_images(tmp_path):
    for make in (classes,loose):
        root = make(tmp_path/make.__name__)
        before = ImageFiles(root)
        for o in ('@eaDir','.ipynb_checkpoints'): paint(root/o/'cat/thumbnail.png', 0, 0)
        if make is classes: paint(root/'cat/@eaDir/cat0.png/thumbnail.png', 0, 0)
        assert ImageFiles(root).name==before.name and repr(ImageFiles(root))==repr(before)

def test_a_name_with_a_line_break_is_a_name(tmp_path):
    (classes(tmp_path/'pets')/'cat').rename(tmp_path/'pets/house\ncat')
    images = ImageFiles(tmp_path/'pets')
    assert '30 images in 3 classes' in images.survey() and 'house\ncat' in folder_dls(images, size=32, bs=4, num_workers=0).vocab

@pytest.mark.parametrize('make,message', [('empty','holds no images'), ('of_one_class','has one class'), ('broken','cannot be read')])
def test_an_archive_of_no_use_leaves_nothing(make, message, tmp_path, monkeypatch):
    monkeypatch.setattr('kdfast.data.files.fastai_path', lambda kind: tmp_path/'home')
    root = globals()[make](tmp_path/'pets')
    archive = Path(shutil.make_archive(str(root), 'gztar', root.parent, root.name))
    with pytest.raises(ValueError, match=message): ImageFiles(archive).survey()
    assert not [*(tmp_path/'home').iterdir()] and archive.exists()

def changed(path, how):
    files = get_image_files(path).sorted()
    if how=='content': files[0].write_bytes(files[0].read_bytes()[:-1]+b'\0')  # of the same size
    if how=='renamed': files[0].rename(files[0].with_name('other.png'))
    if how=='label': shutil.move(path/'cat/cat0.png', path/'dog/cat0.png')
    if how=='gone': files[0].unlink()
    if how=='added': shutil.copy(files[0], path/'cat/another.png')

@pytest.mark.parametrize('how', ['content','renamed','label','gone','added'])
def test_changed_images_have_another_name(how, tmp_path):
    path = classes(tmp_path/'pets')
    before = ImageFiles(path).name
    moved = path.rename(tmp_path/'elsewhere')
    (moved/'notes.txt').write_text('no image')
    again = (tmp_path/'deeper').mkdir() or moved.rename(tmp_path/'deeper/pets')
    assert ImageFiles(again).name==before
    changed(again, how)
    assert ImageFiles(again).name!=before

def test_another_split_is_another_data_set(tmp_path):
    csv = table(tmp_path, '01')
    before = ImageFiles(csv)
    pd.read_csv(csv).assign(valid=[int(i<6) for i in range(30)]).to_csv(csv, index=False)
    after = ImageFiles(csv)
    assert {*after.labels}=={*before.labels} and after.name!=before.name

def test_rows_in_another_order_are_the_same_images(tmp_path):
    csv = table(tmp_path)
    before = ImageFiles(csv)
    pd.read_csv(csv).sample(frac=1, random_state=0).to_csv(csv, index=False)
    after = ImageFiles(csv)
    assert after.name==before.name and after.valid==before.valid

def test_a_run_of_other_images_is_refused(tmp_path):
    path = classes(tmp_path/'pets')
    run = Run(data=ImageFiles(path).name, size=32, bs=4, pct=.5)
    assert images_in(run, path)==12 and len(dls_of(run, path).train_ds)==12
    with pytest.raises(ValueError, match='so images or labels differ'): dls_of(replace(run, data='pets-00000000'), path)
    with pytest.raises(ValueError, match='pass the folder'): dls_of(run)

small = '--size 32 --bs 8 --teacher-epochs 1 --epochs 1 --student wrn-10-1'.split()

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Files of random weights of two of timm's networks"
    set_seed(0)
    folder = tmp_path_factory.mktemp('weights')
    for o in ('test_vit','test_efficientnet'): torch.save(timm.create_model(o).state_dict(), folder/f'{o}.pth')
    return folder

def of_timm(weights, name='test_vit'): return ['--teacher', f'timm:{name}', '--teacher-weights', str(weights/f'{name}.pth')]

def distilled(*args, out):
    main(['distill', *small, *map(str, args), '--out', str(out)])
    return read_results(out/'records.jsonl')

def labels(results): return [label_of(o) for o in arms_of(results)]

@pytest.mark.parametrize('from_files', slow_but(False, of=[False,True]))
def test_a_folder_on_the_command_line(from_files, tmp_path, capsys):
    "What is there is told, records have no absolute path, a rerun goes on, and a changed image is another run"
    path,args = classes(tmp_path/'pets'),['--teacher','wrn-10-2','--method','kd',*['--from-files']*from_files]
    results,name = distilled('--data', path, *args, out=tmp_path/'out'),ImageFiles(path).name
    told = capsys.readouterr().out
    assert f'{name}: 30 images in 3 classes, the smallest ' in told and 'sides from 32 to 32 pixels, median 32; no broken files' in told
    assert {o.data for o in results}=={name} and labels(results)==['control','kd'] and all(r.from_files==from_files for r in results)
    assert all(0<=o['accuracy']<=1 and o['images']['training']==24 and o['images']['validation']==6 for o in results.values())
    record = (tmp_path/'out/records.jsonl').read_text()+(tmp_path/f'out/{name}.txt').read_text()
    assert str(tmp_path) not in record and '--data ./pets --size 32' in record
    assert load_learner(tmp_path/'out/student-kd.pkl').model(torch.zeros(2,3,32,32)).shape==(2,3)
    assert distilled('--data', path.rename(tmp_path/'moved').rename(path), *args, out=tmp_path/'out')==results and 'epoch 1 of' not in capsys.readouterr().out
    paint(path/'cat/cat0.png', 0, 99)
    after = distilled('--data', path, *args, out=tmp_path/'out')
    assert len(after)==2*len(results) and {o.data for o in after}=={name,ImageFiles(path).name}

@pytest.mark.slow
def test_a_folder_is_compressed(tmp_path, capsys):
    "A student that `distill` left, then one of its own"
    path,out = classes(tmp_path/'pets'),tmp_path/'out'
    distilled('--data', path, '--teacher', 'wrn-10-1', '--method', 'control', out=tmp_path/'students')
    args = ['compress','--data',str(path),'--steps','factorize:.5','--out',str(out),*small[:-2]]
    main([*args, '--teacher-file', str(tmp_path/'students/student-control.pkl')])
    main([*args, '--teacher', 'wrn-10-1'])
    results,name = read_results(out/'records.jsonl'),ImageFiles(path).name
    assert {o.data for o in results}=={name} and [r.student for r in arms_of(results)]==['student-control.pkl','wrn-10-1'] and str(tmp_path) not in (out/'records.jsonl').read_text()
    assert f'{name}: 30 images in 3 classes' in capsys.readouterr().out and (out/f'{name}.txt').is_file()
    assert OnnxModel(out/'student-factorize-.5.onnx')(torch.zeros(1,3,32,32)).shape==(1,3)

def test_images_without_labels_are_not_compressed(tmp_path):
    with pytest.raises(SystemExit, match='raw has no labels, by which a network is compared with its compressed self: pass class folders'):
        main(['compress','--data',str(loose(tmp_path/'raw')),'--out',str(tmp_path/'out')])
    assert not (tmp_path/'out').exists()

def test_a_broken_file_that_comes_later_is_found(tmp_path):
    path = classes(tmp_path/'pets')
    args = '--data',path,'--teacher','wrn-10-1','--method','control'
    before = distilled(*args, out=tmp_path/'out')
    (path/'cat/new.png').write_text('no image')
    with pytest.raises(SystemExit, match='1 of 31 images'): distilled(*args, out=tmp_path/'out')
    assert read_results(tmp_path/'out/records.jsonl')==before

@pytest.mark.slow
def test_a_network_of_timm_teaches_as_it_is(tmp_path, weights, capsys):
    "With its own weights, normalization and size; its classes are others, so features teach"
    path = classes(tmp_path/'pets')
    results = distilled('--data', path, *of_timm(weights), out=tmp_path/'out')
    assert labels(results)==['control','fitnet:standardize']
    (run,teacher),net = first(teachers_of(results).items()),timm.create_model('test_vit')
    net.load_state_dict(torch.load(weights/'test_vit.pth'))
    assert run.weights==teacher['weights']==digest(net)=={r.method:o for r,o in results.items()}['fitnet:standardize']['teacher weights']
    assert teacher['accuracy'] is None and teacher['parameters']==count_params(net) and teacher['MACs']==count_macs(net, 160)
    assert 'Teacher timm:test_vit: accuracy unknown' in capsys.readouterr().out and not (tmp_path/'out/teachers').exists()
    assert results==distilled('--data', path, *of_timm(weights), out=tmp_path/'out')
    other = distilled('--data', path, *of_timm(weights, 'test_efficientnet'), '--method', 'fitnet', out=tmp_path/'out')
    assert len(other)==len(results)+2  # another teacher and its student, the same control

def test_a_teacher_that_knows_the_classes(tmp_path, weights):
    "Its outputs for them teach, and its accuracy is known"
    wordnet = 'n02123045','n02099601','n01518878'
    path = classes(tmp_path/'pets')
    for a,b in zip(('cat','dog','emu'), wordnet): (path/a).rename(path/b)
    results = distilled('--data', path, *of_timm(weights, 'test_efficientnet'), out=tmp_path/'out')
    assert labels(results)==['control','kd'] and 0<=first(teachers_of(results).values())['accuracy']<=1

def test_students_of_timm(tmp_path, weights):
    results = distilled('--data', classes(tmp_path/'pets'), *of_timm(weights), '--student', 'timm:test_efficientnet', out=tmp_path/'out')
    net = load_learner(tmp_path/'out/student-fitnet-standardize.pkl').model
    assert count_params(net)==first(arms_of(results).values())['parameters'] and net(torch.zeros(2,3,32,32)).shape==(2,3)

@pytest.mark.slow
def test_pretrained_students(tmp_path, weights, monkeypatch):
    "Both arms begin with the weights that are on file where torch.hub keeps them"
    set_seed(3)  # a run with seed 0 would have the same random weights
    net = torchvision.models.resnet18()
    (tmp_path/'hub/checkpoints').mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path/'hub/checkpoints'/torchvision.models.ResNet18_Weights.DEFAULT.url.split('/')[-1])
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    args = '--student','resnet18','--pretrained-student','--lr','1e-7'
    results = distilled('--data', classes(tmp_path/'pets'), *of_timm(weights), *args, out=tmp_path/'out')
    assert labels(results)==['control','fitnet:standardize'] and all(o.pretrained and o.student=='torchvision.resnet18' for o in arms_of(results))
    for o in ('control','fitnet-standardize'):
        conv = first(m for m in load_learner(tmp_path/f'out/student-{o}.pkl').model.modules() if isinstance(m, nn.Conv2d))
        assert (conv.weight-net.conv1.weight).abs().max()<1e-4

def test_weights_that_cannot_be_had(tmp_path, weights, monkeypatch):
    def offline(*args, **kwargs): raise URLError('no connection')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    args = '--data',classes(tmp_path/'pets'),'--student','resnet18','--pretrained-student'
    with pytest.raises(SystemExit, match='weights of torchvision.resnet18 cannot be loaded .URLError'): distilled(*args, *of_timm(weights), out=tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_images_without_labels(tmp_path, weights, capsys):
    "No control, the terms' losses, a column of the probe, and a student that gets its head afterwards"
    path,labelled = loose(tmp_path/'loose'),classes(tmp_path/'labelled')
    args = '--data',path,*of_timm(weights),'--method','similarity,at'
    results,told = distilled(*args, '--epochs', 2, '--probe', labelled, out=tmp_path/'out'),capsys.readouterr().out
    assert labels(results)==['similarity','at'] and {o['accuracy'] for o in results.values()}=={None}
    assert 'Without labels the accuracy is not known' in told and 'classifier_learner' in told and ' knn ' in told and 'against control' not in told
    for r,o in arms_of(results).items():
        assert r.probe==ImageFiles(labelled).name and len(o['history']['knn'])==2 and o['losses']['knn']==o['history']['knn'][-1]
        assert o['losses'][r.method]>0 and not o['losses']['train_loss'] and f"{o['losses'][r.method]:.3g}" in told
    assert str(tmp_path) not in (tmp_path/'out/records.jsonl').read_text()
    assert distilled(*args, '--epochs', 2, '--probe', labelled, out=tmp_path/'out')==results
    learn = classifier_learner(folder_dls(labelled, size=32, bs=8, in_memory=True), load_learner(tmp_path/'out/student-at.pkl'), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert learn.model(torch.zeros(2,3,32,32)).shape==(2,3)
    assert labels(distilled('--data', path, *of_timm(weights), '--from-files', out=tmp_path/'files'))==['fitnet:standardize']

def test_a_learner_teaches_images_without_labels(tmp_path):
    learn = Learner(folder_dls(classes(tmp_path/'pets'), size=32, bs=8, in_memory=True), wrn(10, 2, n_out=3), path=tmp_path)
    learn.export('teacher.pkl')
    results = distilled('--data', loose(tmp_path/'loose'), '--teacher-file', tmp_path/'teacher.pkl', out=tmp_path/'out')
    assert labels(results)==['fitnet:standardize'] and first(teachers_of(results).values())['weights']==digest(learn.model)

def broken(root):
    classes(root)
    for i in range(7): (root/f'cat/cat{i}.png').write_text('no image')
    return root

def of_one_class(root):
    classes(root)
    for o in ('dog','emu'): shutil.rmtree(root/o)
    return root

def empty(root):
    root.mkdir()
    (root/'notes.txt').write_text('no image')
    return root

def beside(root):
    paint(classes(root)/'stray.png', 0, 0)
    return root

def csv_of(root, text):
    paint(root/'a.png', 0, 0)
    (root/'pets.csv').write_text(text)
    return root/'pets.csv'

def new_in_valid(root):
    paint(split(root)/'valid/yak/yak.png', 3, 0)
    return root

bad = dict(
    empty=(empty, [], 'holds no images'), nothing=(lambda root: root, [], 'Unknown data set'), path=(classes, ['--path','x'], 'pass it as --data alone'),
    broken=(broken, [], r'7 of 30 images in .*pets cannot be read, cat.cat0.png, cat.cat1.png, .* and more: remove or replace them'),
    one_class=(of_one_class, [], 'has one class, cat'), beside=(beside, [], 'such as stray.png'), new=(new_in_valid, [], 'has no images of yak to train on'),
    columns=(partial(csv_of, text='name,label\na.png,cat\n'), [], 'has the columns name, label: it needs file and label'),
    missing=(partial(csv_of, text='file,label\na.png,cat\nb.png,dog\n'), [], 'lists files that do not exist .1., b.png'),
    twice=(partial(csv_of, text='file,label\na.png,cat\na.png,dog\n'), [], 'lists a.png twice'),
    blank=(partial(csv_of, text='file,label\na.png,\n'), [], 'lists a.png without a label'),
    no_table=(partial(csv_of, text=''), [], 'cannot be read'), valid=(partial(csv_of, text='file,label,valid\na.png,cat,perhaps\n'), [], 'has the values perhaps as valid'),
    few=(partial(csv_of, text='file,label\na.png,cat\n'), [], 'has one image of each class'),
    kd=(loose, ['--method','kd,similarity'], 'has no labels, which kd would read'), cskd=(loose, ['--method','cskd'], 'which cskd would read'),
    blocks=(loose, ['--method','blocks'], 'which blocks would read'), nobody=(loose, ['--teacher','wrn-10-1'], 'which wrn-10-1 would be trained on'),
    teacher=(classes, ['--teacher','timm:test_vitt'], "did you mean 'test_vit'"), student=(classes, ['--student','timm:resnet18x'], "did you mean 'resnet18'"),
    unknown=(classes, ['--teacher','resnet11'], "Unknown network 'resnet11'"), not_timm=(classes, ['--teacher','wrn-10-1'], 'not for wrn-10-1'),
    pretrained=(classes, ['--pretrained-student'], "Unknown network 'wrn-10-1': choose from torchvision's"),
    probe=(loose, ['--probe','{root}'], 'Probe needs DataLoaders with labels'), no_probe=(loose, ['--probe','nowhere'], "Unknown data set 'nowhere'"))

@pytest.mark.parametrize('case', bad)
def test_bad_input(case, tmp_path, monkeypatch, weights):
    "Each is found before anything is trained, and before there is a folder"
    make,args,message = bad[case]
    path,monkey = make(tmp_path/'pets'),monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    needs_file = '--teacher' not in args or case=='not_timm'
    given = [*(of_timm(weights) if needs_file else []), *(o.format(root=path) for o in args)]
    with pytest.raises(SystemExit, match=f'^kdfast: .*{message}'): distilled('--data', path, *given, out=tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('file,message', [('test_efficientnet.pth','cannot be read from .*test_efficientnet.pth'), ('nowhere.pth','cannot be read from .*nowhere.pth')])
def test_weights_of_another_network(file, message, tmp_path, weights):
    args = '--data',classes(tmp_path/'pets'),'--teacher','timm:test_vit','--teacher-weights',weights/file
    with pytest.raises(SystemExit, match=f'^kdfast: .*{message}'): distilled(*args, out=tmp_path/'out')
    assert not (tmp_path/'out').exists()
