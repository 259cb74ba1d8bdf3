//! Rows of Parquet files: text, numbers, and lists and structs of them; columns of other types are left out.

use std::{fs::File, path::Path, sync::Arc};

use parquet::{
    basic::{ConvertedType, Type as PhysicalType},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, reader::RowIter},
    schema::types::Type,
};
use serde_json::{Map, Number, Value};

use super::{RawRow, UseRow, size_of};
use crate::error::{Error, Place, Result, RowFault};

pub(super) fn rows(path: &Path, use_row: &mut UseRow) -> Result<()> {
    let file = File::open(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let broken = |e: ParquetError| Error::Parquet { path: path.to_path_buf(), reason: in_words(&e) };
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let metadata = reader.metadata().file_metadata();
    let total = metadata.num_rows().max(1) as u64;
    let projection = readable(metadata.schema_descr().root_schema());
    let size = size_of(path)?;
    let rows = RowIter::from_file_into(Box::new(reader)).project(Some(projection)).map_err(broken)?;
    for (index, row) in rows.enumerate() {
        let place = Place::Row(index);
        let row = row.map_err(|e| Error::Row {
            path: path.to_path_buf(),
            place,
            fault: Box::new(RowFault::Table(in_words(&e))),
        })?;
        let columns = row.into_columns().into_iter().map(|(name, field)| (name, json(field)));
        let value = Value::Object(Map::from_iter(columns));
        // the row reader does not tell its place in the file: rows are taken to be of one size
        let bytes_read = (u128::from(size) * (index as u128 + 1) / u128::from(total)) as u64;
        if use_row(RawRow { place, value, bytes_read })?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The schema without the columns that have no counterpart in JSON.
fn readable(schema: &Type) -> Type {
    let fields: Vec<Arc<Type>> = schema.get_fields().iter().filter(|field| has_json(field)).cloned().collect();
    let kept = Type::group_type_builder(schema.name()).with_fields(fields).build();
    kept.unwrap_or_else(|_| schema.clone())
}

/// Whether all values in a column are text, numbers, truth values, or made of those.
fn has_json(field: &Type) -> bool {
    use ConvertedType::{ENUM, INT_8, INT_16, INT_32, INT_64, JSON, NONE, UINT_8, UINT_16, UINT_32, UINT_64, UTF8};
    if field.is_group() {
        return field.get_fields().iter().all(|field| has_json(field));
    }
    let converted = field.get_basic_info().converted_type();
    match field.get_physical_type() {
        PhysicalType::BOOLEAN | PhysicalType::FLOAT | PhysicalType::DOUBLE => true,
        PhysicalType::INT32 => matches!(converted, NONE | INT_8 | INT_16 | INT_32 | UINT_8 | UINT_16 | UINT_32),
        PhysicalType::INT64 => matches!(converted, NONE | INT_64 | UINT_64),
        PhysicalType::BYTE_ARRAY => matches!(converted, UTF8 | ENUM | JSON),
        PhysicalType::INT96 | PhysicalType::FIXED_LEN_BYTE_ARRAY => false,
    }
}

fn json(field: Field) -> Value {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match field {
        Field::Bool(truth) => truth.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        // the digits an f32 is written with, not those of the f64 it widens to
        Field::Float(n) => float(n.to_string().parse().unwrap_or(f64::from(n))),
        Field::Double(n) => float(n),
        Field::Str(text) => text.into(),
        Field::Group(row) => {
            Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, json(field))).collect())
        }
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(json).collect()),
        Field::MapInternal(map) => {
            let text = |key: &Field| match json(key.clone()) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(key, value)| (text(key), json(value.clone()))).collect())
        }
        _ => Value::Null,
    }
}

/// The error in its first words: for a text that is no UTF-8 the library prints every byte of it.
fn in_words(error: &ParquetError) -> String {
    let words = error.to_string();
    if words.contains("BYTE_ARRAY as String") {
        return "a text is no UTF-8".to_string();
    }
    match words.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", words.get(..end).unwrap_or_default()),
        None => words,
    }
}
