"use strict";
// Undoes lungkit/report/html/volumes.py: base64, gzip, and the coding of grey values.

async function unpackVolume(entry) {
  const block = document.getElementById(entry.block);
  const bytes = await gunzip(fromBase64(block.textContent));
  block.remove();  // the text is twice as large as what it held
  const voxels = entry.shape[0] * entry.shape[1] * entry.shape[2];
  const values = entry.coding === "i16" ? fromDifferences(bytes, entry.shape) : bytes;
  if (values.length !== voxels) {
    throw new Error(`volume ${entry.block} holds ${values.length} voxels, not ${voxels}; the file is damaged`);
  }
  return { ...entry, values, strides: [1, entry.shape[0], entry.shape[0] * entry.shape[1]] };
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const bytes = new Uint8Array(Math.ceil(text.length / 4) * 3);
  const step = 1 << 20;  // a multiple of 4; longer strings than this are slow to walk
  let length = 0;
  for (let start = 0; start < text.length; start += step) {
    const part = atob(text.slice(start, start + step));
    for (let i = 0; i < part.length; i++) bytes[length++] = part.charCodeAt(i);
  }
  return bytes.subarray(0, length);
}

async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromDifferences(bytes, shape) {
  const voxels = bytes.length / 2;
  const values = new Int16Array(voxels);
  for (let start = 0; start < voxels; start += shape[0]) {
    let value = 0;
    for (let i = start; i < start + shape[0]; i++) {
      const folded = bytes[i] | (bytes[voxels + i] << 8);
      value += (folded >>> 1) ^ -(folded & 1);
      values[i] = value;  // wraps to 16 bits, as the differences did
      value = values[i];
    }
  }
  return values;
}

// Value of a volume at a voxel of the scan; null outside the part that was kept.
function valueAt(volume, voxel) {
  let index = 0;
  for (let axis = 0; axis < 3; axis++) {
    const at = Math.floor(voxel[axis] / volume.factor[axis]) - volume.offset[axis];
    if (at < 0 || at >= volume.shape[axis]) return null;
    index += at * volume.strides[axis];
  }
  return volume.values[index] * volume.scale + volume.intercept;
}
