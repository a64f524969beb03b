"The numbers of the papers, to the last parameter"
import pytest
from kdfast.all import *

kinds = [Full,Dilated2x2,Separable]
table = {(40,2): [(2248954,2243546), (1012474,1007066), (304074,293514)],
         (40,1): [(566650,563930),   (256890,254170),   (87882,82570)],
         (16,2): [(693498,691674),   (317178,315354),   (101578,98186)],
         (16,1): [(175994,175066),   (81274,80346),     (29642,27914)]}

@pytest.mark.parametrize('size', table, ids=str)
@pytest.mark.parametrize('kind', range(3), ids=[k.__name__ for k in kinds])
def test_wrn(size, kind):
    net = wrn(*size, conv=kinds[kind])
    assert (count_params(net, buffers=True),count_params(net))==table[size][kind]

def test_wrn_28_10():
    net = wrn(28, 10)
    assert count_params(net)==36_479_194
    assert round(count_macs(net, 32)/1e9, 4)==5.2433

def test_resnets():
    assert count_params(resnet(34, 1000))==21_797_672 and count_params(resnet(18, 1000))==11_689_512
    assert count_params(resnet(34, 1000, conv=Separable), buffers=True)==3_163_752
    assert count_params(resnet(18, 1000, width=.5))==3_055_880
