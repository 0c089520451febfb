import os
os.environ["TRITON_INTERPRET"]="1"
import torch, time, warnings, collections
warnings.simplefilter("ignore")
from tests.cases import CASES, make
from tests.compare import library, excess
import attn_n
bad=collections.Counter(); t0=time.time(); n=0; slow=[]
import sys
for dtype in (torch.float32, torch.float16, torch.bfloat16)[: int(sys.argv[1])]:
    for case in CASES:
        t=time.time()
        try:
            inputs=make(case,dtype,"cpu")
            ex=excess(inputs, library(inputs,"triton"))
            w=max(ex.values())
            if not w<=1: bad[str(case)]+=1; print(dtype,case,{k:round(v,2) for k,v in ex.items()})
        except attn_n.UnsupportedError as e: print(case,"UNSUPPORTED",[l for l in str(e).splitlines() if "triton" in l][:2])
        except Exception as e: bad[str(case)]+=1; print(dtype,case,type(e).__name__,str(e)[:300])
        n+=1; slow.append((time.time()-t,str(case)))
print(n,"cases",len(bad),"bad",time.time()-t0); print(sorted(slow)[-5:])
