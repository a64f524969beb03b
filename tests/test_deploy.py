"Files that take pixels, and run without fastai and torch"
import json, onnx, onnxruntime, os, pytest, shutil, subprocess, sys
from conftest import few_digits
from fastai.vision.all import *
from kdfast.all import *
from kdfast import predict
from kdfast.compress.deploy import _in_int8, Pixels
from kdfast.predict import as_rgb, DeployedModel, predict_file
from kdfast.teacher.source import normalizer

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Forty small photographs of two classes, of all sizes"
    folder,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(40):
        kind,(h,w) = ('bright','dark')[i%2],rng.integers(20, 70, 2)
        noise = rng.integers(0, 256, (h//6+1,w//6+1,3), dtype=np.uint8)//2 + np.uint8(100 if kind=='bright' else 0)
        (folder/kind).mkdir(exist_ok=True)
        Image.fromarray(noise).resize((w,h), Image.Resampling.BICUBIC).save(folder/kind/f'{i}.png')
    return folder

def student_on(folder, path, tfm=None, batch_tfms=None, net=None, loss_func=None, epochs=2, **kwargs):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.5, seed=0, item_tfms=tfm, batch_tfms=batch_tfms or Normalize.from_stats(*imagenet_stats), bs=4, num_workers=0, **kwargs)
    learn = distill_learner(dls, None, net or partial(wrn, 10, 1), loss_func=loss_func, metrics=accuracy, path=path)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    return learn

def probabilities(learn, image):
    with learn.no_bar(), learn.no_logging(): return learn.predict(image)[2].numpy()

others = (pytest.param(o, marks=pytest.mark.slow) for o in (Resize((20,30)), Resize(24, ResizeMethod.Squish)))

@pytest.mark.parametrize('tfm', [Resize(24), *others], ids=['crop','oblong','squish'])
def test_a_file_does_what_validation_does(tfm, photos, tmp_path):
    learn = student_on(photos, tmp_path, tfm)
    report = learn.deploy()
    net = DeployedModel(tmp_path/'student.onnx')
    assert report.file==tmp_path/'student.onnx' and report.agreement==1 and report.images==20 and report.difference<.03 and report.student==report.deployed
    assert [*tmp_path.iterdir()]==[report.file] and net.classes==['bright','dark'] and net.outputs=='probabilities'
    for file in get_image_files(photos)[:6]:
        assert np.abs(net(net.pixels(file))[0]-probabilities(learn, file)).max()<.03
        said = predict_file(report.file, file)
        assert [*said]==[net.classes[i] for i in net(net.pixels(file))[0].argsort()[::-1]] and sum(said.values())==pytest.approx(1, abs=1e-4)

@pytest.mark.slow
def test_a_stretched_image_is_no_cropped_one(photos, tmp_path):
    "What the other tests could not tell apart"
    learn = student_on(photos, tmp_path, Resize(24))
    learn.deploy('crop.onnx', softmax=False)
    learn.deploy('squish.onnx', resize='squish', agree=0, softmax=False)
    wide = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (30,90,3), dtype=np.uint8)).resize((60,20)) for i in range(8)]
    with learn.no_bar(): right = learn.get_preds(dl=learn.dls.test_dl(wide), act=noop)[0].numpy()
    crop,squish = (np.concatenate([net(net.pixels(o)) for o in wide]) for net in map(DeployedModel, (tmp_path/'crop.onnx',tmp_path/'squish.onnx')))
    assert 10*np.abs(crop-right).max()<np.abs(squish-right).max()

def test_it_runs_alone(photos, tmp_path):
    "One file of Python beside the student; torch, fastai and kdfast cannot be imported"
    learn = student_on(photos, tmp_path, Resize(24))
    learn.deploy()
    shutil.copy(predict.__file__, tmp_path/'predict.py')
    (tmp_path/'sitecustomize.py').write_text('import sys\nsys.modules.update(torch=None, fastai=None, kdfast=None)')
    images = [str(o) for o in get_image_files(photos)[:2]]
    res = subprocess.run([sys.executable, 'predict.py', 'student.onnx', *images, '--top', '1'], cwd=tmp_path, env={**os.environ, 'PYTHONPATH':str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert res.returncode==0, res.stderr
    for line,image in zip(res.stdout.splitlines(), images, strict=True):
        (name,p), = predict_file(tmp_path/'student.onnx', image, 1).items()
        assert line==f'{image}: {name} {100*p:.1f} %'

class Inverted(Transform):
    "A step of validation that a file does not know"
    order = 20
    def encodes(self, x:TensorImage): return 1-x

class Gamma(Transform):
    "One that leaves the first class alone"
    order = 2
    def encodes(self, x:PILImage): return PILImage(x.point([int(255*(i/255)**.3) for i in range(256)]*3))

@pytest.mark.slow
@pytest.mark.parametrize('tfms', [dict(tfm=Resize(24), batch_tfms=[Inverted()]), dict(tfm=[Resize(24),Gamma()])], ids=['Inverted','Gamma'])
def test_a_file_that_disagrees_is_kept_apart(tfms, photos, tmp_path):
    learn,name = student_on(photos, tmp_path, **tfms),'Gamma' if isinstance(tfms['tfm'], list) else 'Inverted'
    (tmp_path/'student.onnx').write_text('before')
    with pytest.raises(ValueError, match=rf'disagrees with the student on [\d.]+% of 20 .* kept as student-disagrees.onnx: it has no {name}, which'): learn.deploy()
    assert (tmp_path/'student.onnx').read_text()=='before' and {o.name for o in tmp_path.iterdir()}=={'student.onnx','student-disagrees.onnx'}
    assert DeployedModel(tmp_path/'student-disagrees.onnx').classes==['bright','dark']

@pytest.mark.slow
def test_images_of_one_size_are_checked_as_well(photos, tmp_path):
    "Without a Resize, too, the file gets what is served, not what the student sees"
    folder = tmp_path/'same'
    for o in get_image_files(photos):
        (folder/o.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(o).resize((24,24)).save(folder/o.parent.name/o.name)
    assert student_on(folder, tmp_path).deploy().agreement==1
    with pytest.raises(ValueError, match='it has no Inverted'): student_on(folder, tmp_path, batch_tfms=[Inverted()]).deploy()

def test_images_of_16_bits_are_read_as_the_student_reads_them(photos, tmp_path):
    "fastai clips them, kdfast.predict scales them: a file for which this matters disagrees"
    folder = tmp_path/'deep'
    for o in get_image_files(photos):
        (folder/o.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(o).convert('L')).astype(np.uint16)).save(folder/o.parent.name/o.name)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # tells bright from dark
    with torch.no_grad(): net[0].weight[:] = tensor([1.,-1.])[:,None,None,None]
    nn.init.zeros_(net[0].bias)
    with pytest.raises(ValueError, match='disagrees with the student'): student_on(folder, tmp_path, Resize(24), net=net, epochs=0).deploy()

def test_random_states_and_order(photos, tmp_path):
    learn = student_on(photos, tmp_path, Resize(24))
    reverse = learn.dls.valid.new(get_idxs=lambda: [*range(20)][::-1])
    learn.dls.loaders[1] = reverse
    before = random.getstate(),torch.get_rng_state()
    assert learn.deploy().agreement==1
    assert random.getstate()==before[0] and torch.equal(torch.get_rng_state(), before[1])

@pytest.mark.slow
def test_images_in_memory(dls, teacher, quiet, tmp_path):
    "The student of a distillation, as it stands: bare, and in the mode it was in"
    learn = quiet(distill_learner(dls, teacher, wrn(10, 1), cbs=[KD(),FitNet()], metrics=accuracy, path=tmp_path), 2, 1e-2)
    learn.model.train()
    report = learn.deploy(softmax=False)
    assert learn.model.training and report.agreement==1 and report.difference<1e-4 and report.images==60
    with learn.no_bar(): assert report.student==pytest.approx(learn.validate()[1]) and report.deployed==report.student
    net,x = DeployedModel(report.file, 1),dls.valid_ds[0][0]
    with probing(learn.student): want = learn.student(first(dls.valid)[0])[0]
    assert torch.allclose(torch.tensor(net(x.permute(1,2,0).numpy()[None])[0]), want.as_subclass(Tensor), atol=1e-4) and net.outputs=='logits'
    about = {o.key:o.value for o in onnx.load(report.file).metadata_props}
    assert about==dict(classes=json.dumps([*map(str, dls.vocab)]), pixels='[16, 16]', resize='crop', outputs='logits', normalization=json.dumps(dict(mean=[.305]*3, std=[.36]*3)))

def test_other_sizes_are_left_to_the_caller(photos, tmp_path):
    "A way of resizing that is not in the file: it takes one size, and says so"
    learn = student_on(photos, tmp_path, RandomResizedCrop(24))
    report = learn.deploy()
    image = Image.open(get_image_files(photos)[0])
    assert report.agreement==1 and report.difference<.02
    with pytest.raises(ValueError, match=f'takes images of 24x24 pixels, got one of {image.width}x{image.height}: resize it'): predict_file(report.file, image)
    assert len(predict_file(report.file, image.resize((24,24))))==2
    with pytest.raises(ValueError, match=r'uint8 of shape \(n,24,24,3\), got uint8 \(1, 20, 24, 3\)'): DeployedModel(report.file)(np.zeros((1,20,24,3), np.uint8))

class Grey(nn.Sequential):
    def __init__(self, n_out): super().__init__(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out))

def test_grey_images(photos, tmp_path):
    learn = student_on(photos, tmp_path, Resize(24), batch_tfms=[Normalize.from_stats([.5],[.3])], net=Grey, img_cls=PILImageBW)
    report,file = learn.deploy(),get_image_files(photos)[0]
    assert report.agreement==1 and DeployedModel(report.file).shape==[None,None,None,1]
    assert predict_file(report.file, file)['dark']==pytest.approx(probabilities(learn, file)[1], abs=.02)

def test_without_labels(teacher, tmp_path):
    x = torch.randint(256, (8,3,16,16), dtype=torch.uint8)
    learn = distill_learner(tensor_dls((x,None), (x,None), bs=4), teacher, wrn(10, 1), path=tmp_path)
    report = learn.deploy()
    assert report.agreement==1 and 'student' not in report and DeployedModel(report.file).classes==[*map(str, range(10))]

runtimes = {'onnx':'student.onnx', 'openvino':'student.xml', 'executorch':'student.pte', 'coreml':'student.mlpackage'}

@pytest.mark.slow
@pytest.mark.parametrize('runtime,int8', [('onnx',True),('openvino',False),('executorch',False),('executorch',True),
    pytest.param('coreml', False, marks=pytest.mark.skipif(sys.platform!='darwin', reason='Core ML runs on macOS alone'))])
def test_every_runtime(runtime, int8, trained, dls, photos, tmp_path):
    "The same answers as the student's, alone and in a batch that is larger than one run of ExecuTorch takes, and for an image of another size"
    learn = distill_learner(dls, None, trained, metrics=accuracy, path=tmp_path)
    report,tol = learn.deploy(runtimes[runtime], int8=int8, agree=.95 if int8 else .99),.15 if int8 else .02 if runtime=='coreml' else 1e-4
    assert report.difference<tol and abs(report.student-report.deployed)<.04 and report.images==60
    assert {o.suffix for o in tmp_path.iterdir()}=={report.file.suffix, *(['.bin'] if runtime=='openvino' else [])}
    assert report.MB==sum(o.stat().st_size for o in tmp_path.iterdir())/1e6 and (report.MB<.5)==int8
    net,pixels = DeployedModel(report.file, 1),np.stack([x.permute(1,2,0).numpy() for x,_ in dls.valid_ds])
    alone = np.concatenate([net(o[None]) for o in pixels])
    assert np.abs(net(np.concatenate([pixels,pixels]))-np.concatenate([alone,alone])).max()<(.05 if int8 else 1e-4)
    file = get_image_files(photos)[0]
    right = learn.dls.valid_ds.tls[0].tfms.fs[0].resize(PILImage.create(file), split_idx=1)
    want = probabilities(learn, np.asarray(right))
    assert np.abs(np.array([predict_file(report.file, file, 10)[str(i)] for i in range(10)])-want).max()<(.3 if int8 else .03)
    assert net.size==[16,16] and net.resize=='crop' and (net.shape[1] is None)==(runtime=='onnx')

# Core ML runs on macOS alone; here its file is read instead, operator by operator

def _padded(x, weight, pad, strides, dilations, groups, pad_type=None, bias=None):
    return F.conv2d(F.pad(x, [*map(int, pad.roll(2))]), weight, bias, [*map(int, strides)], 0, [*map(int, dilations)], int(groups))

operators = {'cast':lambda x, dtype: x, 'mul':lambda x, y: x*y, 'add':lambda x, y: x+y, 'sub':lambda x, y: x-y, 'relu':lambda x: x.relu(), 'conv':_padded,
    'batch_norm':lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon)),
    'reduce_mean':lambda x, axes, keep_dims: x.mean([*map(int, axes)], bool(keep_dims)), 'reshape':lambda x, shape: x.reshape([*map(int, shape)]),
    'linear':F.linear, 'softmax':lambda x, axis: x.softmax(int(axis)), 'classify':lambda probabilities, classes: probabilities}

def as_the_file_says(model, inputs):
    from coremltools.converters.mil.frontend.milproto.load import load
    spec = model.get_spec()
    main = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir).functions['main']
    takes = spec.description.input[0].type.imageType
    assert inputs['image'].size==(takes.width,takes.height) and inputs['image'].mode==dict(GRAYSCALE='L', RGB='RGB')[takes.ColorSpace.Name(takes.colorSpace)]
    pixels = torch.from_numpy(np.array(inputs['image'], np.float32).reshape(takes.height, takes.width, -1))
    known = {'image':pixels.permute(2,0,1)[None]}
    def value(o):
        x = np.asarray(o.val)
        return known[o.name] if o.val is None else torch.from_numpy(x.astype(np.float32)) if x.dtype.kind in 'fiub' else o.val
    for o in main.operations:
        if o.op_type!='const': out = known[o.outputs[-1].name] = operators[o.op_type](**{k:value(v) for k,v in o.inputs.items() if not isinstance(v, (list,tuple))})
    ends = spec.description
    if not ends.predictedProbabilitiesName: return {ends.output[0].name:out.numpy()}
    names = [*main.find_ops(op_type='classify')[0].inputs['classes'].val]
    return {ends.predictedProbabilitiesName:dict(zip(names, out[0].tolist()))}

@pytest.mark.slow
@pytest.mark.parametrize('grey,softmax', [(False,True),(True,True),(False,False)])
def test_core_ml_as_its_file_says(grey, softmax, photos, tmp_path, monkeypatch):
    "Colours, normalization, classes and weights in half precision, as a Mac would get them"
    import coremltools
    monkeypatch.setattr(coremltools.models.MLModel, 'predict', as_the_file_says, raising=False)
    for o in ('kdfast.predict.runs_here','kdfast.compress.deploy.runs_here'): monkeypatch.setattr(o, lambda file: True)
    stats = ([.5],[.3]) if grey else ([.7,.5,.3],[.2,.3,.4])
    learn = student_on(photos, tmp_path, Resize((24,16)), batch_tfms=[Normalize.from_stats(*stats)], net=Grey if grey else None, img_cls=PILImageBW if grey else PILImage)
    (tmp_path/'student.mlpackage').mkdir()
    (tmp_path/'student.mlpackage/old').touch()
    report = learn.deploy('student.mlpackage', softmax=softmax)
    net,file = DeployedModel(report.file),get_image_files(photos)[0]
    assert report.agreement==1 and report.images==20 and report.difference<.03 and report.student==report.deployed
    assert [*tmp_path.iterdir()]==[report.file] and not (report.file/'old').exists() and report.MB==sum(o.stat().st_size for o in report.file.rglob('*') if o.is_file())/1e6
    assert net.shape==[None,24,16,1 if grey else 3] and net.classes==['bright','dark'] and net.outputs==('probabilities' if softmax else 'logits')
    if softmax: assert predict_file(report.file, file)['dark']==pytest.approx(probabilities(learn, file)[1], abs=.03)

elsewhere = pytest.mark.skipif(sys.platform=='darwin', reason='the file itself is checked there')

@elsewhere
def test_core_ml_elsewhere_is_checked_before_its_conversion(trained, dls, tmp_path):
    learn = distill_learner(dls, None, trained, metrics=accuracy, path=tmp_path)
    with pytest.warns(UserWarning, match='checked before its conversion to Core ML, which runs on macOS alone'): report = learn.deploy('student.mlpackage')
    assert report.agreement==1 and report.difference<1e-4 and report.student==report.deployed and 'ms' not in report
    assert [*tmp_path.iterdir()]==[report.file] and all(o.stat().st_mode&0o444==0o444 for o in report.file.rglob('*'))
    with pytest.raises(ImportError, match='which macOS and iOS alone have'): DeployedModel(report.file)
    with pytest.raises(ValueError, match='Core ML files are written in floating point'): learn.deploy('student.mlpackage', int8=True)

class OneVector(nn.Sequential):
    def forward(self, x): return super().forward(x).squeeze()

class MeanOff(nn.Sequential):
    def forward(self, x): return super().forward(x)-super().forward(x).mean(0)

class Bessel(nn.Sequential):
    def forward(self, x): return super().forward(torch.special.i0(x))

@pytest.mark.slow
@elsewhere
@pytest.mark.parametrize('kind,match', [(OneVector,'one image has not one output a class'), (MeanOff,'disagrees with the student on'), (Bessel,'it has no special_i0'), (None,'an output is not finite')])
def test_core_ml_of_what_cannot_be_served(kind, match, dls, tmp_path):
    net = wrn(10, .5)
    if not kind: nn.init.constant_(net.fc.bias, float('nan'))
    learn = distill_learner(dls, None, kind(net) if kind else net, path=tmp_path)
    with pytest.raises(ValueError, match=match): learn.deploy('student.mlpackage', softmax=False)
    assert not (tmp_path/'student.mlpackage').exists()

def test_a_file_in_the_place_of_a_folder(dls, tmp_path):
    (tmp_path/'student.mlpackage').touch()
    with pytest.raises(ValueError, match='student.mlpackage is in the way: choose another name'): distill_learner(dls, None, wrn(10, .5), path=tmp_path).deploy('student.mlpackage')

places = [Path(o) for o in (os.environ.get('ONNXRUNTIME_INCLUDE', ''),'/usr/include/onnxruntime','/usr/include/stb','/usr/local/include','/usr/include') if o]
lacking = [o for o in ('onnxruntime_cxx_api.h','stb_image.h','nlohmann/json.hpp') if not any((p/o).exists() for p in places)]

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')
@pytest.mark.skipif(bool(lacking), reason=f"needs the headers {', '.join(lacking)}, in /usr/include or where ONNXRUNTIME_INCLUDE says")
def test_the_program_in_cpp(trained, dls, photos, tmp_path):
    "Compiled, and linked with the library that the wheel of onnxruntime holds"
    learn = distill_learner(dls, None, trained, metrics=accuracy, path=tmp_path)
    learn.deploy()
    library, = (Path(onnxruntime.__file__).parent/'capi').glob('libonnxruntime.so.*')
    (tmp_path/'libonnxruntime.so.1').symlink_to(library)
    source = Path(__file__).parent.parent/'nbs/howto/classify.cpp'
    options = *(f'-I{o}' for o in places),library,f'-Wl,-rpath,{tmp_path}','-o',tmp_path/'classify'
    subprocess.run(['g++', '-std=c++17', source, *options], check=True, timeout=300)
    for i,image in enumerate([dls.valid_ds[0][0],dls.valid_ds[1][0],*map(Image.open, get_image_files(photos)[:2])]):
        file = tmp_path/f'{i}.png'
        (Image.fromarray(image.permute(1,2,0).numpy()).resize((40,30)) if isinstance(image, Tensor) else image).save(file)
        name,p = subprocess.check_output([tmp_path/'classify', 'student.onnx', file], cwd=tmp_path, text=True, timeout=60).split()
        assert {name:float(p)}==pytest.approx(predict_file(tmp_path/'student.onnx', file, 1), abs=1e-4)

def test_a_runtime_that_is_missing(dls, tmp_path, monkeypatch):
    learn = distill_learner(dls, None, wrn(10, .5), path=tmp_path)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match=r'pip install kdfast\[openvino\]'): learn.deploy('student.xml')
    (tmp_path/'theirs.xml').write_text('')
    with pytest.raises(ImportError, match='pip install openvino'): DeployedModel(tmp_path/'theirs.xml')
    assert [o.name for o in tmp_path.iterdir()]==['theirs.xml']
    monkeypatch.setitem(sys.modules, 'coremltools', None)
    with pytest.raises(ImportError, match=r'pip install kdfast\[coreml\]'): learn.deploy('student.mlpackage')
    assert [o.name for o in tmp_path.iterdir()]==['theirs.xml']

class Odd(nn.Sequential):
    def forward(self, x): return super().forward(x) + torch.linalg.svdvals(x.mean(1))[:,:1]

@pytest.mark.slow
@pytest.mark.parametrize('file', runtimes.values())
def test_an_operator_that_a_runtime_lacks(file, dls, tmp_path):
    "It is named"
    learn = distill_learner(dls, None, Odd(nn.Flatten(), nn.Linear(768, 10)), path=tmp_path)
    with pytest.raises(ValueError, match=r'has no .*linalg_svd.*replace that operator, or write another kind of file'): learn.deploy(file)
    assert [*tmp_path.iterdir()]==[]

@pytest.mark.slow
def test_a_convolution_that_two_layers_read(dls):
    "The stem of a wrn-10-1 has a batch norm behind it and a shortcut around that, which torchao folds into one: .5 to .9 of the outputs are then wrong"
    net = wrn(10, 1)
    for b in dls.train: net.train()(b[0].as_subclass(Tensor))
    nn.init.uniform_(net.group1[0].bn1.weight, 3, 6)
    net,pixels = Pixels(net, normalizer(dls), (16,16), 'none', False).eval(),torch.stack([x.permute(1,2,0) for x,_ in dls.valid_ds]).as_subclass(Tensor)
    with torch.no_grad(): rounded,right = _in_int8(net, pixels[:2], [pixels.numpy()])(pixels),net(pixels)
    assert (rounded-right).norm()<.1*right.norm()

@pytest.mark.slow
def test_what_is_no_classifier(dls, photos, tmp_path):
    blocks = dict(several_labels=dict(blocks=(ImageBlock,MultiCategoryBlock), get_y=lambda o: ['a']), numbers=dict(blocks=(ImageBlock,RegressionBlock), get_y=lambda o: 1.),
        two_labels=dict(blocks=(ImageBlock,CategoryBlock,CategoryBlock), n_inp=1, get_y=[lambda o: 'a', lambda o: 'b']))
    for task in blocks.values():
        other = DataBlock(item_tfms=ToTensor(), **task).dataloaders([Image.fromarray(np.zeros((16,16,3), np.uint8)) for _ in range(8)], bs=2, num_workers=0)
        learn = Learner(other, wrn(10, .5, n_out=1), loss_func=F.mse_loss, path=tmp_path)
        with pytest.raises(ValueError, match='classifiers of images.*export_onnx'): learn.deploy()
    with pytest.raises(ValueError, match='classifiers of images'): Learner(dls, wrn(10, .5, n_out=12), path=tmp_path).deploy()
    for net,loss in ((wrn(10, .5, n_out=2), BCEWithLogitsLossFlat()), (nn.Sequential(wrn(10, .5, n_out=2), nn.Softmax(1)), nn.NLLLoss())):
        learn = student_on(photos, tmp_path, Resize(24))
        learn.model,learn.loss_func = net,loss
        with pytest.raises(ValueError, match='otherwise than by a softmax: pass softmax=False'): learn.deploy()
        assert learn.deploy(softmax=False).agreement==1
    assert [o.name for o in tmp_path.iterdir()]==['student.onnx']

@pytest.mark.slow
def test_of_an_int8_student(dls, quiet, tmp_path):
    learn = quiet(distill_learner(dls, None, wrn(10, .5), path=tmp_path), 1)
    with pytest.raises(ValueError, match='deploy to .onnx or .pte for int8'): learn.deploy('a.xml', int8=True)
    learn.quantize()
    for kwargs in (dict(int8=True), dict(fname='student.pte')):
        with pytest.raises(ValueError, match='int8 already: deploy it to .onnx without int8=True'): learn.deploy(**kwargs)
    assert [*tmp_path.iterdir()]==[] and learn.deploy(agree=.9).images==60

@pytest.mark.slow
def test_weights_of_seven_bits(dls, quiet, tmp_path):
    "Two products fit in 16 bits, in which processors without VNNI add them"
    import onnx
    learn = quiet(distill_learner(dls, None, wrn(10, .5), path=tmp_path), 1)
    learn.deploy('student.onnx', int8=True, agree=0)
    whole = [onnx.numpy_helper.to_array(o).astype(int) for o in onnx.load(tmp_path/'student.onnx').graph.initializer if o.data_type==onnx.TensorProto.INT8]
    most = max(abs(o).max() for o in whole)
    assert len([o for o in whole if o.ndim==4])==10 and 60<most and 2*255*most<2**15

class PerBatch(nn.Sequential):
    "Reads the mean of the batch"
    def forward(self, x): return super().forward(x-x.mean(0))

@pytest.mark.slow
def test_bad_input(dls, quiet, tmp_path):
    learn = distill_learner(dls, None, wrn(10, .5), path=tmp_path)
    with pytest.raises(ValueError, match='No form for student.bin: its suffix must be .onnx or .xml or .pte'): learn.deploy('student.bin')
    with pytest.raises(ValueError, match='other outputs than each alone.* remove what depends on the batch'):
        distill_learner(dls, None, PerBatch(nn.Flatten(), nn.Linear(768, 10)), path=tmp_path).deploy(agree=0)
    plain = torch.utils.data.DataLoader([(torch.zeros(3,16,16), 0)]*4, batch_size=2)
    with pytest.raises(ValueError, match='got a DataLoader: use learn.export_onnx'): Learner(DataLoaders(plain, plain), wrn(10, .5), loss_func=CrossEntropyLossFlat(), path=tmp_path).deploy()
    with pytest.raises(ValueError, match="resize must be 'crop', 'squish' or 'none', got 'pad'"): learn.deploy(resize=ResizeMethod.Pad)
    with pytest.raises(ValueError, match='No validation image .* set learn.dls'): learn.deploy(n=0)
    (tmp_path/'student.bin').write_text('mine')
    with pytest.raises(ValueError, match='student.bin is in the way: choose another name'): learn.deploy('student.xml')
    (tmp_path/'student.bin').unlink()
    learn.export_onnx('network.onnx')
    quiet(learn, 1)
    for p in learn.student.parameters(): nn.init.constant_(p, math.nan)
    with pytest.raises(ValueError, match='an output is not finite'): learn.deploy(softmax=False)
    (tmp_path/'student-disagrees.onnx').unlink()
    with pytest.raises(ValueError, match='takes no pixels: write it with learn.deploy'): DeployedModel(tmp_path/'network.onnx')
    with pytest.raises(FileNotFoundError): DeployedModel(tmp_path/'none.onnx')
    with pytest.raises(ValueError, match='No runtime for a.bin'): DeployedModel(tmp_path/'a.bin')
    assert [o.name for o in tmp_path.iterdir()]==['network.onnx']

def test_sixteen_bits():
    deep = Image.fromarray(np.full((2,2), 257*200, np.uint16))
    assert (np.asarray(as_rgb(deep))==200).all()
    with pytest.raises(ValueError, match='more than 16 bits'): as_rgb(Image.fromarray(np.full((2,2), 2**20, np.int32)))
