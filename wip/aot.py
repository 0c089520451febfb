import os, sys, re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
TARGETS={"sm_80":GPUTarget("cuda",80,32),"sm_90":GPUTarget("cuda",90,32),"sm_100":GPUTarget("cuda",100,32),"gfx942":GPUTarget("hip","gfx942",64)}
class Fake:
    def __init__(self,t): self.t=t
    def get_current_target(self): return self.t
    def get_current_device(self): return 0
    def get_current_stream(self,d): return 0
    def is_active(self): return True
    def get_active_torch_device(self): return torch.device("cpu")
BIN=os.path.join(os.path.dirname(triton.__file__),"backends/nvidia/bin")
found=[]
orig=JITFunction.run
def run(self,*a,grid,warmup,**k):
    r=orig(self,*a,grid=grid,warmup=True,**k); found.append((self.__name__,r)); return r
JITFunction.run=run
from attn_n.backends.triton import BACKEND
from attn_n.call import Options
def stat(target,name,k):
    if target.startswith("sm"):
        with tempfile.NamedTemporaryFile("w",suffix=".ptx",delete=False) as f: f.write(k.asm["ptx"])
        arch=target+("a" if target!="sm_80" else "")
        ptxas=BIN+("/ptxas-blackwell" if target=="sm_100" else "/ptxas")
        r=subprocess.run([ptxas,"-v","--gpu-name="+arch,f.name,"-o",f.name+".cubin"],capture_output=True,text=True)
        m=r.stderr
        regs=re.findall(r"Used (\d+) reg",m); sp=re.findall(r"(\d+) bytes spill stores",m)
        warn=set(re.findall(r"C75\d\d",m))
        return f"regs {regs} spill {sp} shared {k.metadata.shared} {warn} {'' if r.returncode==0 else m[-300:]}"
    a=k.asm["amdgcn"]; vg=re.findall(r"vgpr_count: *(\d+)",a)[:1]; vs=re.findall(r"vgpr_spill_count: *(\d+)",a)[:1]; return f"vgpr {vg} spill {vs} shared {k.metadata.shared}"
for target in sys.argv[1].split(","):
    triton.runtime.driver.set_active(Fake(TARGETS[target]))
    for E in map(int,sys.argv[2].split(",")):
        for dt in (torch.bfloat16,torch.float32)[:int(sys.argv[3])]:
            for right in (None,0):
                found.clear()
                q,k,v=[torch.randn(1,2,256,E,dtype=dt) for _ in range(3)]
                o=Options(0.1,None,right)
                out,lse,_=BACKEND.forward(q,k,v,0.0,o)
                BACKEND.backward(out,None,q,k,v,out,lse,None,o)
                for n,kk in found: 
                    if n!="delta_kernel": print(target,E,dt,"causal" if right==0 else "full",n,stat(target,n,kk),flush=True)
