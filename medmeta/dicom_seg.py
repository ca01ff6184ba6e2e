"""Label maps as DICOM SEG, on the slices of the series they were made from. Needs the extra `dicom` (highdicom)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from medmeta.data.volume import Volume
from medmeta.errors import InputError
from medmeta.files import replacing


def write_dicom_seg(labels: Volume, slices: Sequence[Path], targets: Mapping[str, Sequence[int]], path: Path) -> None:
    """Write the structures of a label map as binary segments; they may overlap. The file appears whole or not at all.

    Args:
        labels: (1, X, Y, Z) on the grid of the series.
        slices: the files of the series, in any order.
        targets: structure -> label values.
        path: the file to write.

    Raises:
        InputError: highdicom is not installed, no structure is anywhere, or the label map is not one of this series.
    """
    try:
        import highdicom
        import numpy as np
        import pydicom
    except ImportError as error:
        remedy = "pip install 'medmeta[dicom]'"
        raise InputError("DICOM SEG", f"no package {error.name}", "the package highdicom", remedy) from error
    series = [pydicom.dcmread(file, stop_before_pixels=True) for file in slices]
    order = _along(series, labels)
    voxels = labels.data[0].numpy(force=True)
    masks = {name: np.isin(voxels, list(values)) for name, values in targets.items()}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    if not masks:
        raise InputError(path, "no structure in the label map", "at least one voxel", "There is nothing to store.")
    structure = highdicom.sr.CodedConcept("91723000", "SCT", "Anatomical Structure")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="medmeta",
        family=highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"),
        version=version("medmeta"),
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=structure,
            segmented_property_type=structure,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(masks, 1)
    ]
    # (X, Y, Z) voxels are columns, rows and slices of DICOM.
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        source_images=[series[index] for index in order],
        pixel_array=pixels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=9000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medmeta",
        manufacturer_model_name="medmeta",
        software_versions=version("medmeta"),
        device_serial_number="0",
        series_description="medmeta segmentation, for research",
    )
    with replacing(path) as beside:
        segmentation.save_as(beside)


def _along(series: Sequence, labels: Volume) -> list[int]:
    """Numbers of the files in the order of the label map's slices, by their positions."""
    import numpy as np

    to_voxels = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ labels.affine.numpy(force=True))
    positions = np.array([[*map(float, image.ImagePositionPatient), 1.0] for image in series])
    indices = (to_voxels @ positions.T)[:3].T
    order = np.argsort(indices[:, 2])
    expected = np.stack([np.zeros(len(order)), np.zeros(len(order)), np.arange(len(order))], axis=1)
    # Slices may be off their even places by as much as the reader of the series allows.
    if len(order) != labels.shape[2] or np.abs(indices[order] - expected).max() > 0.5:
        found = f"{len(series)} slices that do not lie on the {labels.shape[2]} of the label map"
        raise InputError("DICOM SEG", found, "the label map of this series")
    return order.tolist()
