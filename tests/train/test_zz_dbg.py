import torch
from tests.train.test_novelty import *
from tests.train.test_novelty import bench
def test_x(bench):
    m=bench.model; print([ (n,p.shape,p.requires_grad) for n,p in m.named_parameters() if 'expert_1' in n])
    try: learn(bench,'sums')
    except AssertionError: pass
    print([(n,float(p.abs().sum()), None if p.grad is None else float(p.grad.abs().sum())) for n,p in m.named_parameters() if 'expert_1' in n])
    print(m.routing_config)
    assert 0
