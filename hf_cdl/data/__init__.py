"""Class-incremental streams of tasks from image-classification data sets."""

from hf_cdl.data.benchmarks import BENCHMARKS as BENCHMARKS
from hf_cdl.data.images import ImageError as ImageError
from hf_cdl.data.loading import NoDataError as NoDataError
from hf_cdl.data.settings import StreamConfig as StreamConfig
from hf_cdl.data.stream import TaskStream as TaskStream
from hf_cdl.data.stream import nothing_held_out as nothing_held_out
from hf_cdl.data.task_split import TaskSplit as TaskSplit
from hf_cdl.data.views import Preprocess as Preprocess
