"""Class-incremental streams of tasks from image-classification data sets."""

from hf_cdl.images import ImageError as ImageError
from hf_cdl.tasks.benchmarks import BENCHMARKS as BENCHMARKS
from hf_cdl.tasks.settings import StreamConfig as StreamConfig
from hf_cdl.tasks.split import TaskSplit as TaskSplit
from hf_cdl.tasks.stream import TaskStream as TaskStream
from hf_cdl.tasks.stream import nothing_held_out as nothing_held_out
from hf_cdl.tasks.tables import NoDataError as NoDataError
from hf_cdl.tasks.transforms import Preprocess as Preprocess
