"""The tasks of the paper's tables, one benchmark a file: its data files, prompt, requests and scores."""

from kosmos_lit.tasks.birds import Birds as Birds
from kosmos_lit.tasks.captions import CocoCaption as CocoCaption
from kosmos_lit.tasks.captions import Flickr30k as Flickr30k
from kosmos_lit.tasks.hateful_memes import HatefulMemes as HatefulMemes
from kosmos_lit.tasks.hellaswag import HellaSwag as HellaSwag
from kosmos_lit.tasks.imagenet import ImageNet as ImageNet
from kosmos_lit.tasks.object_color import ColorTerms as ColorTerms
from kosmos_lit.tasks.object_color import MemoryColor as MemoryColor
from kosmos_lit.tasks.piqa import Piqa as Piqa
from kosmos_lit.tasks.raven import Raven as Raven
from kosmos_lit.tasks.relative_size import RelativeSize as RelativeSize
from kosmos_lit.tasks.rendered_sst2 import RenderedSst2 as RenderedSst2
from kosmos_lit.tasks.rendered_sst2 import RenderedSst2ChainOfThought as RenderedSst2ChainOfThought
from kosmos_lit.tasks.story_cloze import StoryCloze as StoryCloze
from kosmos_lit.tasks.super_glue import BoolQ as BoolQ
from kosmos_lit.tasks.super_glue import CommitmentBank as CommitmentBank
from kosmos_lit.tasks.super_glue import Copa as Copa
from kosmos_lit.tasks.visual_questions import VizWiz as VizWiz
from kosmos_lit.tasks.visual_questions import Vqav2 as Vqav2
from kosmos_lit.tasks.websrc import WebSrc as WebSrc
from kosmos_lit.tasks.winograd import Winograd as Winograd
from kosmos_lit.tasks.winogrande import Winogrande as Winogrande
