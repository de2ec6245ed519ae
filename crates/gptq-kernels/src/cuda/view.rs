//! Borrowed views of device memory: a slice of elements, and a matrix.
//!
//! A view cannot outlive the memory that it was borrowed from, and a part of a view lies inside it: both
//! are checked where the part is made, so safe code reaches no address but these. Views are shared like
//! the contents of a `Cell`: several may be written through, and since all work of a [`Gpu`](super::Gpu)
//! is queued on one stream, reads and writes happen in the order of the calls.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use gptq_types::Dtype;

use super::memory::Buffer;

/// Elements of one type on the GPU.
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    owner: PhantomData<&'a Cell<T>>,
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl<T> fmt::Debug for DeviceSlice<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements at {:#x}", self.len, self.address)
    }
}

impl<'a, T: Pod> DeviceSlice<'a, T> {
    /// The first `len` elements of a buffer.
    ///
    /// # Panics
    /// If it has fewer.
    pub(super) fn of(buffer: &'a Buffer, len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>());
        let fits = bytes.is_some_and(|bytes| bytes <= buffer.bytes());
        assert!(fits, "{len} elements in {} bytes", buffer.bytes());
        DeviceSlice {
            address: buffer.address(),
            len,
            owner: PhantomData,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Some of the elements.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "elements {range:?} of {}",
            self.len
        );
        DeviceSlice {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            ..self
        }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

/// A row-major matrix on the GPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatrix<'a> {
    pub(super) address: u64,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) pitch: usize, // elements from row to row, at least `columns`
    pub(super) dtype: Dtype,
    owner: PhantomData<&'a Cell<u8>>, // stays on its thread, as its GPU does
}

impl fmt::Debug for DeviceMatrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [rows, columns] = [self.rows, self.columns];
        write!(
            f,
            "{} [{rows}, {columns}] at {:#x}",
            self.dtype, self.address
        )
    }
}

impl<'a> DeviceMatrix<'a> {
    /// A matrix `[rows, columns]` without gaps that somebody else allocated.
    ///
    /// # Safety
    /// So many elements of `dtype` lie at `address` on the GPU that the matrix is used on. They stay
    /// there for `'a`, and afterwards until the work that was queued on them is over.
    pub unsafe fn from_address(address: u64, [rows, columns]: [usize; 2], dtype: Dtype) -> Self {
        Self::at(address, [rows, columns], dtype)
    }

    /// For this module's callers, who vouch as for [`DeviceMatrix::from_address`].
    pub(super) fn at(address: u64, [rows, columns]: [usize; 2], dtype: Dtype) -> Self {
        DeviceMatrix {
            address,
            rows,
            columns,
            pitch: columns,
            dtype,
            owner: PhantomData,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether its rows lie behind each other.
    pub fn is_contiguous(&self) -> bool {
        self.pitch == self.columns || self.rows <= 1
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn row_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        DeviceMatrix {
            address: self.address_of(range.start, 0),
            rows: range.len(),
            ..self
        }
    }

    /// Some of the columns; rows stay as far from each other as they are.
    ///
    /// # Panics
    /// If they are not all there.
    pub fn column_range(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.columns,
            "columns {range:?} of {}",
            self.columns
        );
        DeviceMatrix {
            address: self.address_of(0, range.start),
            columns: range.len(),
            ..self
        }
    }

    /// The same elements in rows of another length.
    ///
    /// # Panics
    /// If there are gaps between its rows, or the number of elements is another.
    pub fn reshaped(self, [rows, columns]: [usize; 2]) -> Self {
        let elements = rows.checked_mul(columns);
        assert_eq!(elements, Some(self.contiguous().elements()), "elements");
        DeviceMatrix {
            rows,
            columns,
            pitch: columns,
            ..self
        }
    }

    /// The matrix, checked to have no gaps.
    ///
    /// # Panics
    /// If it has.
    pub(super) fn contiguous(self) -> Self {
        assert!(self.is_contiguous(), "gaps between the rows of {self:?}");
        self
    }

    /// Bytes, which a matrix without gaps has behind each other.
    pub(super) fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    fn address_of(&self, row: usize, column: usize) -> u64 {
        self.address + ((row * self.pitch + column) * self.dtype.size()) as u64
    }

    /// Checks that its elements have sixteen bits.
    ///
    /// # Panics
    /// If they are others.
    pub(super) fn half(self) -> Self {
        let is_half = matches!(self.dtype, Dtype::F16 | Dtype::BF16);
        assert!(is_half, "sixteen-bit floats, not {}", self.dtype);
        self
    }

    /// Checks that it is sixteen-bit, and of the same type as another one.
    ///
    /// # Panics
    /// If it is not.
    pub(super) fn like(self, other: DeviceMatrix) -> Self {
        assert_eq!(self.half().dtype, other.dtype, "type of both");
        self
    }

    /// Checks its shape.
    ///
    /// # Panics
    /// If it has another one.
    pub(super) fn expect(&self, shape: [usize; 2], what: &str) {
        assert_eq!([self.rows, self.columns], shape, "{what}");
    }
}

impl Buffer {
    /// The first `len` elements.
    ///
    /// # Panics
    /// If the buffer has fewer bytes than they take.
    pub fn slice<T: Pod>(&self, len: usize) -> DeviceSlice<'_, T> {
        DeviceSlice::of(self, len)
    }

    /// The first elements as a matrix.
    ///
    /// # Panics
    /// If the buffer has fewer bytes than they take.
    pub fn matrix(&self, [rows, columns]: [usize; 2], dtype: Dtype) -> DeviceMatrix<'_> {
        let elements = rows.checked_mul(columns);
        let bytes = elements.and_then(|elements| elements.checked_mul(dtype.size()));
        let fits = bytes.is_some_and(|bytes| bytes <= self.bytes());
        assert!(
            fits,
            "{rows} x {columns} elements in {} bytes",
            self.bytes()
        );
        DeviceMatrix::at(self.address(), [rows, columns], dtype)
    }
}
