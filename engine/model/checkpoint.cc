#include "engine/model/checkpoint.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "base/status.h"
#include "engine/model/json_fields.h"
#include "fmt/ranges.h"

namespace soloist {

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& model_dir) {
  Checkpoint checkpoint;
  checkpoint.dir_ = model_dir;
  const std::string index_path = model_dir + "/model.safetensors.index.json";
  if (!std::filesystem::exists(index_path)) {
    ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(model_dir + "/model.safetensors"));
    for (const auto& [name, tensor] : file->tensors()) checkpoint.entries_[name] = {file.get(), &tensor};
    checkpoint.files_.push_back(std::move(file));
    return checkpoint;
  }
  std::ifstream stream(index_path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text.str(), index_path));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object()) return InvalidArgument("{}: weight_map is missing", index_path);
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string()) return InvalidArgument("{}: weight_map['{}'] is not a file name", index_path, name);
    const std::string file_name = shard.get<std::string>();
    // A shard is a file of this folder: no path may lead out of it.
    if (file_name.empty() || file_name.find('/') != std::string::npos) {
      return InvalidArgument("{}: weight_map['{}'] is '{}', allowed: names of files in the folder", index_path, name,
                             file_name);
    }
    const SafetensorsFile*& file = shards[file_name];
    if (file == nullptr) {
      ASSIGN_OR_RETURN(auto opened, SafetensorsFile::Open(fmt::format("{}/{}", model_dir, file_name)));
      file = opened.get();
      checkpoint.files_.push_back(std::move(opened));
    }
    const auto tensor = file->tensors().find(name);
    if (tensor == file->tensors().end()) {
      return InvalidArgument("{}: tensor '{}' is not in {}, where the index has it", index_path, name, file_name);
    }
    checkpoint.entries_[name] = {file, &tensor->second};
  }
  return checkpoint;
}

absl::StatusOr<Checkpoint::Entry> Checkpoint::Find(std::string_view name, const std::vector<int64_t>& shape) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotFound("{}: tensor '{}' is not in the checkpoint", dir_, name);
  const Entry& entry = it->second;
  if (entry.tensor->type == StoredType::kOther) {
    return InvalidArgument("{}: tensor '{}' is {}, supported: BF16, F16, F32", entry.file->path(), name,
                           entry.tensor->type_name);
  }
  if (entry.tensor->shape != shape) {
    return InvalidArgument("{}: tensor '{}' has shape {}, expected {} from config.json", entry.file->path(), name,
                           entry.tensor->shape, shape);
  }
  return entry;
}

}  // namespace soloist
